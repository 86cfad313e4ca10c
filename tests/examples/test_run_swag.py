"""run_swag.py as a user starts it: SWAG's columns, COPA and XCOPA, predictions, a resumed run, mistakes."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from example_runs import DATA, SCRIPTS, Run, load_script, results, runner, write_model
from safetensors.torch import load_file
from transformers import AutoModelForMultipleChoice

import adapters
from adapters.errors import AdapterError

# The commands of README.md, but for the steps that `runner` limits.
SWAG = (
    "--model_name_or_path roberta-base --do_train --do_eval --learning_rate 5e-5 --num_train_epochs 3 "
    "--per_gpu_eval_batch_size=16 --per_device_train_batch_size=16 --overwrite_output --train_adapter "
    "--adapter_config seq_bn"
)
COPA = (
    "--model_name_or_path xlm-roberta-base --train_file balacopa-dev-all.xml --validation_file xcopa.val.it.jsonl "
    "--test_file xcopa.test.it.jsonl --do_train --do_eval --do_predict --train_adapter --adapter_config lora"
)
ITEM = (
    '<item id="1" asks-for="effect" most-plausible-alternative="2"><p>It rained.</p>'
    "<a1>We ran.</a1><a2>We got wet.</a2></item>"
)
ROW = {
    "sent1": "She opened the door.",
    "sent2": "She",
    "ending0": "went in.",
    "ending1": "flew.",
    "ending2": "ate it.",
    "label": 0,
}
CHOICE = {"premise": "Piove.", "choice1": "Corriamo.", "choice2": "È bagnato.", "question": "effect", "label": 1}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models, files of choices (real ones of COPA where they are), and no network."""
    folder = DATA / "multiple_choice"
    names = {
        "balacopa-dev-all.xml": f"<copa-corpus>{ITEM * 12}</copa-corpus>",
        "xcopa.val.it.jsonl": f"{json.dumps(CHOICE)}\n" * 12,
        "xcopa.test.it.jsonl": f"{json.dumps(CHOICE)}\n" * 12,
    }
    for name, made_up in names.items():
        real = folder / name
        (tmp_path / name).write_text(real.read_text("utf-8") if real.is_file() else made_up, "utf-8")
    write_rows(tmp_path / "swag.jsonl", [{**ROW, "label": number % 3} for number in range(24)])
    for name in ("roberta-base", "xlm-roberta-base"):
        write_model(tmp_path / name, ["she opened the door . went in", "what was cause of this ? il la"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("multiple-choice/run_swag.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch):
    (place / "allenai/swag").mkdir(parents=True)  # what stands for the Hub's dataset
    page = "---\nconfigs:\n- config_name: regular\n  data_files:\n  - {split: train, path: train.csv}\n"
    (place / "allenai/swag/README.md").write_text(f"{page}  - {{split: validation, path: validation.csv}}\n---\n")
    for split in ("train", "validation"):
        Dataset.from_list([{**ROW, "label": number % 3} for number in range(8)]).to_csv(
            place / f"allenai/swag/{split}.csv"
        )
    out = run(f"{SWAG} --max_train_samples 6 --max_eval_samples 5")
    assert results(out)["eval_samples"] == 5 and 0 <= results(out)["eval_accuracy"] <= 1
    model = AutoModelForMultipleChoice.from_pretrained(place / "roberta-base")
    adapters.init(model)
    assert model.load_adapter(str(out / "swag")) == "swag"


def test_copa_and_its_predictions(run: Run, place: Path):
    out = run(f"{COPA} --max_train_samples 12 --max_eval_samples 6 --max_predict_samples 7")
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in (place / "xcopa.test.it.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 7 and all(row["scores"][row["prediction"]] == max(row["scores"]) for row in rows)
    right = sum(row["prediction"] == label for row, label in zip(rows, labels, strict=False))
    assert results(out, "predict")["predict_accuracy"] == pytest.approx(right / 7)


def test_a_resumed_run_ends_as_an_unbroken_one(run: Run, place: Path, caplog: pytest.LogCaptureFixture):
    line = f"{SWAG.replace('--overwrite_output', '').replace('size=16', 'size=4')} --save_steps 2"
    line += " --train_file swag.jsonl --validation_file swag.jsonl"
    whole = run(line, steps=4)
    wanted = load_file(whole / "swag/adapter.safetensors")
    whole.rename(place / "WHOLE")
    (place / "OUT").mkdir()
    (place / "WHOLE/checkpoint-2").rename(place / "OUT/checkpoint-2")
    caplog.set_level("INFO")
    again = load_file(run(line, steps=4) / "swag/adapter.safetensors")
    assert "Resuming from OUT/checkpoint-2" in caplog.text
    assert wanted and all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_what_the_model_reads(script: ModuleType, place: Path):
    options = script.DataTrainingArguments(train_file="x")
    (place / "one.xml").write_text(f"<copa-corpus>{ITEM}</copa-corpus>")
    asked = "What happened as a result?"
    for data, wanted in (
        (Dataset.from_list([ROW]), ("She opened the door.", ["She went in.", "She flew.", "She ate it."], 0)),
        (script.read_file(place / "one.xml", None), ("It rained.", [f"{asked} We ran.", f"{asked} We got wet."], 1)),
        (Dataset.from_list([CHOICE]), ("Piove.", [f"{asked} Corriamo.", f"{asked} È bagnato."], 1)),
    ):
        assert tuple(script.prepare(data, "train", options)[0].values()) == wanted


def test_the_old_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["run_multiple_choice.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPTS / "multiple-choice/run_multiple_choice.py"), run_name="__main__")
    assert "--max_seq_length" in capsys.readouterr().out


MISTAKES = [
    ("nowhere.csv", "nowhere.csv: there is no such file"),
    ("empty.xml", "empty.xml: the file is empty"),
    ("latin.csv", "latin.csv: it cannot be read as csv .*utf-8"),
    ("latin.xml", "latin.xml: it cannot be read as xml"),
    ("text.txt", "its extension is '.txt'; it must be one of .xml, .csv"),
    ("column.jsonl", "The train data has no column sent2, only"),
    ("label.jsonl", "row 2, has the label 3; it must be the place of the right choice, 0 to 2"),
    ("question.jsonl", "row 1, has the question 'why'; it must be one of cause, effect"),
    ("null.jsonl", "row 1, has no ending1"),
]


@pytest.mark.parametrize(("file", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, file: str, message: str):
    (place / "empty.xml").touch()
    (place / "latin.csv").write_bytes(",".join(ROW).encode() + b"\nf\xfcr,a,b,c,d,0\n")
    (place / "latin.xml").write_bytes(ITEM.replace("rained", "f\xfcr").encode("latin-1"))
    write_rows(place / "column.jsonl", [{name: value for name, value in ROW.items() if name != "sent2"}])
    write_rows(place / "label.jsonl", [ROW, {**ROW, "label": 3}])
    write_rows(place / "question.jsonl", [{**CHOICE, "question": "why"}])
    write_rows(place / "null.jsonl", [{**ROW, "ending1": None}])
    with pytest.raises(AdapterError, match=message):
        run(f"{SWAG} --train_file {file} --validation_file swag.jsonl")
