"""What the tests of example scripts share: a script as a module, small random models, results."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import BertConfig, BertModel, BertTokenizer, set_seed

SCRIPTS = Path(__file__).parents[2] / "examples/pytorch"
DATA = Path(__file__).parents[3] / "shared/data"
Run = Callable[..., Path]


def load_script(path: str) -> ModuleType:
    """The script `path` below examples/pytorch, under its own name: pickled functions are found again."""
    file = SCRIPTS / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent))  # as python does for a script: one imports another one beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def runner(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, common: str) -> Run:
    """A function that runs the script with `common` and more options in this process, and returns OUT, its output."""

    def start(line: str, steps: int = 2) -> Path:
        always = f"--output_dir OUT --cache_dir {place / 'cache'} --max_steps {steps} --use_cpu --disable_tqdm True"
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *common.split(), *always.split(), *line.split()])
        script.main()
        return place / "OUT"

    return start


def write_model(folder: Path, texts: list[str], **settings: Any) -> None:
    """A random BERT of two layers, and a tokenizer that knows the words of the texts."""
    words = sorted({word for text in texts for word in text.lower().split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), "utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **settings}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **size)).save_pretrained(folder)


def results(folder: Path, kind: str = "eval") -> dict[str, float]:
    return json.loads((folder / f"{kind}_results.json").read_text())
