"""Dependency parsing and embeddings of 1.3.0: its files are read, give its outputs, and are written as they were."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import AutoAdapterModel

GOLDEN = Path(__file__).parent / "goldens" / "parsing.zip"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(folder)
    return folder


def test_files_of_1x_are_read_and_written_again(golden, tmp_path):
    expected = load_file(golden / "outputs.safetensors")
    given = {key.removeprefix("given/"): value for key, value in expected.items() if key.startswith("given/")}
    model = AutoAdapterModel.from_pretrained(golden / "base").eval()
    assert model.load_adapter(golden / "ud", set_active=True) == model.active_head == "ud"
    check(model(**given), expected, "default")
    tokenizer = model.load_embeddings(golden / "embeddings", "other")
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 25
    check(model(**given), expected, "other")

    model.save_adapter(tmp_path / "ud", "ud")
    model.save_embeddings(tmp_path / "embeddings", "other", tokenizer)
    for name in ("embeddings/embedding.pt",):
        assert torch.equal(torch.load(tmp_path / name), torch.load(golden / name))
    old = torch.load(golden / "ud/pytorch_model_head.bin")
    new = load_file(tmp_path / "ud/model_head.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def check(output, expected, name) -> None:
    found = {"loss": output.loss, "arcs": output.arc_preds, "relations": output.rel_preds}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[f"{name}/{key}"], atol=1e-5, rtol=1e-5)
