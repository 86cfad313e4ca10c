"""run_image_classification.py as a user starts it: the commands of the page, predictions, a resumed run, mistakes."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from example_runs import load_script, results
from pages import command_of, make_data, run
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel, set_seed

from adapters import AutoAdapterModel
from adapters.errors import AdapterError

FOLDER = "image-classification"
SHORT = "--max_train_samples 16 --max_eval_samples 8 --max_steps 2"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def write_vision_model(folder: Path, model: torch.nn.Module) -> None:
    model.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), "utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with small models under the names of the page's."""
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    write_vision_model(tmp_path / "models/dinov2-small", Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)))
    write_vision_model(
        tmp_path / "google/vit-base-patch16-224-in21k", ViTModel(ViTConfig(**SIZE, intermediate_size=64))
    )
    for color in ("red", "blue"):
        (tmp_path / "flowers" / color).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (20, 30), color).save(tmp_path / f"flowers/{color}/{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(f"{FOLDER}/run_image_classification.py")


def test_digits(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    make_data(FOLDER, "load_digits")
    out = run(script, command_of(FOLDER, "out/digits"), f"{SHORT} --max_predict_samples 5", monkeypatch)
    assert results(out)["eval_samples"] == 8 and 0 <= results(out)["eval_accuracy"] <= 1
    lines = [line.split("\t") for line in (out / "predictions.txt").read_text("utf-8").splitlines()]
    assert lines[0] == ["image", "prediction"] and len(lines) == 6
    right = [Path(file).parent.name == digit for file, digit in lines[1:]]
    assert results(out, "predict")["predict_accuracy"] == pytest.approx(np.mean(right))
    model = AutoAdapterModel.from_pretrained("models/dinov2-small")
    model.load_adapter(str(out / "images"), set_active=True)
    assert model.get_labels() == [str(digit) for digit in range(10)]


def test_a_folder_without_validation_data_is_learnt(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    more = "--max_steps 12 --learning_rate 1e-2 --per_device_train_batch_size 8 --image_size 42"
    out = run(script, command_of(FOLDER, "out/flowers"), more, monkeypatch)
    assert results(out)["eval_samples"] == 3 and results(out)["eval_accuracy"] == 1
    Path("shown").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (9, 9), color).save(f"shown/{color}.png")
    again = f"--test_dir shown --do_predict --load_adapter {out}/images --output_dir out/used"
    command = [word for word in command_of(FOLDER, "out/flowers") if word not in ("--do_train", "--do_eval")]
    out = run(script, command, again, monkeypatch)
    lines = dict(line.split("\t") for line in (out / "predictions.txt").read_text("utf-8").splitlines())
    assert lines == {"image": "prediction", "shown/red.png": "red", "shown/blue.png": "blue"}


def test_a_resumed_run_ends_as_an_unbroken_one(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    command = [word for word in command_of(FOLDER, "out/flowers") if word != "--overwrite_output_dir"]
    more = "--per_device_train_batch_size 4 --max_steps 4 --save_steps 2"
    out = run(script, command, more, monkeypatch)
    wanted = load_file(out / "images/adapter.safetensors")
    out.rename("WHOLE")
    out.mkdir()
    Path("WHOLE/checkpoint-2").rename(out / "checkpoint-2")
    again = load_file(run(script, command, more, monkeypatch) / "images/adapter.safetensors")
    assert wanted and all(torch.equal(again[name], value) for name, value in wanted.items())


MISTAKES = [
    ("--train_dir nowhere", "nowhere: there is no such folder"),
    ("--train_dir empty", "empty: there are no images in it"),
    ("--train_dir loose", "loose/1.png: the image is in no folder of a class"),
    ("--train_dir broken", "broken/red/1.png: it cannot be read as an image"),
    ("--validation_dir unseen", "The validation data has the class 'green', which is not one of training"),
    ("--train_val_split 2", "train_val_split=2.0: it is no share"),
    ("--do_predict", "There is no test data, only train, validation"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes_are_told(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str):
    for folder in ("empty", "loose", "broken/red", "unseen/green"):
        Path(folder).mkdir(parents=True)
    for file in ("loose/1.png", "unseen/green/1.png"):
        Image.new("RGB", (8, 8)).save(file)
    Path("broken/red/1.png").write_bytes(b"no image")
    with pytest.raises(AdapterError, match=message):
        run(script, command_of(FOLDER, "out/flowers"), f"{SHORT} {line}", monkeypatch)
