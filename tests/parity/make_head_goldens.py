"""Writes ``goldens/parsing.zip``: what adapters 1.3.0 computes for dependency parsing, and embeddings that it saved.

RUN THIS IN THE REFERENCE ENVIRONMENT ONLY (adapters 1.3.0, transformers 4.57.6): it never imports this library.

    python tests/parity/make_head_goldens.py          writes the zip
    python tests/parity/make_head_goldens.py FOLDER   reads what test_head_goldens.py writes there with --basetemp

The zip holds ``base/`` (a model), ``ud/`` (an adapter with its head), ``embeddings/`` and ``outputs.safetensors``.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from adapters import AutoAdapterModel

GOLDEN = Path(__file__).parent / "goldens" / "parsing.zip"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"v{number}" for number in range(20))]
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def outputs(model, given):
    with torch.no_grad():
        out = model(**given)
    return {"loss": out.loss, "arcs": out.arc_preds, "relations": out.rel_preds}


def make(folder: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=48, pad_token_id=0, **SIZE)).save_pretrained(folder / "base")
    model = AutoAdapterModel.from_pretrained(folder / "base")
    model.add_adapter("ud", "seq_bn")
    model.add_dependency_parsing_head("ud", num_labels=4)
    model.set_active_adapters("ud")
    for name, parameter in model.named_parameters():
        if ".ud." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    model.save_adapter(str(folder / "ud"), "ud")
    given = {
        "input_ids": torch.randint(3, 25, (3, 7)),
        "word_starts": torch.tensor([[1, 2, 4, 6], [1, 3, 4, 0], [2, 5, 0, 0]]),
        "labels_arcs": torch.tensor([[2, 3, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]),
        "labels_rels": torch.randint(0, 4, (3, 7)),
    }
    found = {f"given/{key}": value for key, value in given.items()}
    found |= {f"default/{key}": value for key, value in outputs(model, given).items()}
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    model.add_embeddings("other", tokenizer)
    (folder / "embeddings").mkdir()
    model.save_embeddings(str(folder / "embeddings"), "other", tokenizer)
    found |= {f"other/{key}": value for key, value in outputs(model, given).items()}
    save_file({key: value.clone().contiguous() for key, value in found.items()}, folder / "outputs.safetensors")
    (folder / "vocab.txt").unlink()
    with zipfile.ZipFile(GOLDEN, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.writestr(
                    zipfile.ZipInfo(str(file.relative_to(folder))), file.read_bytes(), zipfile.ZIP_DEFLATED
                )


def read_back(written: Path) -> float:
    """The largest deviation of what 1.3.0 computes with the files of this library."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(folder)
        expected = load_file(Path(folder) / "outputs.safetensors")
        model = AutoAdapterModel.from_pretrained(Path(folder) / "base")
        model.load_adapter(str(written / "ud"), set_active=True, use_safetensors=True)
        model.load_embeddings(str(written / "embeddings"), "other")
        model.eval()
        given = {key.removeprefix("given/"): value for key, value in expected.items() if key.startswith("given/")}
        found = outputs(model, given)
    return max(float((found[key] - expected[f"other/{key}"]).abs().max()) for key in found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"deviation {read_back(Path(sys.argv[1])):.1e}")
    else:
        with tempfile.TemporaryDirectory() as made:
            make(Path(made))
