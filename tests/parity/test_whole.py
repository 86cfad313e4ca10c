"""Whole models that 1.3.0 saved compute here what they computed there, whatever the format of the file."""

import json
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from make_whole import ARCHIVE, MODELS, outputs
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import adapters
from adapters import AutoAdapterModel


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def loaded(folder: Path, kind: str):
    if kind == "bert_static":
        return adapters.load_model(folder, BertForSequenceClassification, output_loading_info=True)
    return AutoAdapterModel.from_pretrained(folder, output_loading_info=True)


def same(found: dict[str, torch.Tensor], folder: Path) -> None:
    for name, expected in load_file(folder / "outputs.safetensors").items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.filterwarnings("ignore:.*ignored alpha; alpha is set to r:UserWarning")
@pytest.mark.parametrize("kind", list(MODELS))
def test_outputs(kind, root, tmp_path):
    model, info = loaded(root / kind, kind)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same(outputs(model), root / kind)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():  # what is written here has no old settings any more
        warnings.simplefilter("error")
        again, _ = loaded(tmp_path, kind)
    same(outputs(again), root / kind)


@pytest.mark.filterwarnings("ignore:.*ignored alpha; alpha is set to r:UserWarning")
def test_pickled_and_in_parts(root, tmp_path):
    whole = load_file(root / "bert" / "model.safetensors")
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, key in enumerate(sorted(whole)):
        parts[number % 2][key] = whole[key]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (tmp_path / "config.json").write_text((root / "bert" / "config.json").read_text())
    same(outputs(AutoAdapterModel.from_pretrained(tmp_path)), root / "bert")
