"""What several tests of scripts start from."""

from pathlib import Path

import pytest
from seq2seq_material import articles, squad, translations, write_t5


@pytest.fixture(scope="session")
def small_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random T5 whose tokenizer was trained on some of the texts."""
    folder = tmp_path_factory.mktemp("t5") / "t5-small"
    texts = [row["text"] for row in articles()[:40]]
    texts += [text for row in translations()[:200] for text in row["translation"].values()]
    texts += [paragraph["context"] for paragraph in squad("en")[0]["paragraphs"]]
    write_t5(folder, texts, vocabulary=400, d_model=32, d_kv=8, d_ff=32)
    return folder
