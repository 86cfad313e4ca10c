"""run_seq2seq_qa.py as a user starts it: SQuAD's files, windows, the best of several answers, mistakes."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_runs import Run, load_script, results, runner
from safetensors.torch import load_file
from seq2seq_material import TEXT, squad, write_rows
from transformers import AutoTokenizer

from adapters.errors import AdapterError

# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path t5-small --train_file train-v1.1.json --validation_file dev-v1.1.json --do_train --do_eval "
    "--predict_with_generate --per_device_train_batch_size 4 --learning_rate 3e-5 --num_train_epochs 2 "
    "--max_seq_length 384 --doc_stride 128 --train_adapter --adapter_config seq_bn --overwrite_output_dir"
)
SHORT = f"{COMMAND.replace('384', '64').replace('stride 128', 'stride 8')} --max_train_samples 8 --max_eval_samples 4"
SHORT += " --max_answer_length 8 --no_pad_to_max_length"


def made_up(number: int, **values: Any) -> dict[str, Any]:
    answers = {"text": [TEXT.split()[number]], "answer_start": [TEXT.index(TEXT.split()[number])]}
    row = {"id": str(number), "question": f"which word is number {number}?", "context": TEXT, "answers": answers}
    return {**row, **values}


@pytest.fixture
def place(tmp_path: Path, small_t5: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, files of questions, and no network."""
    shutil.copytree(small_t5, tmp_path / "t5-small")
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / name).write_text(json.dumps({"version": "1.1", "data": squad("en")[:1]}), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("question-answering/run_seq2seq_qa.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run):
    line = f"{COMMAND} --max_train_samples 8 --max_eval_samples 4 --do_predict --test_file dev-v1.1.json"
    out = run(f"{line} --max_predict_samples 3")
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= results(out).keys() and results(out)["eval_samples"] == 4
    for kind, number in {"eval": 4, "predict": 3}.items():
        answers = json.loads((out / f"{kind}_predictions.json").read_text("utf-8"))
        assert len(answers) == number and all(isinstance(answer, str) for answer in answers.values())
    assert (out / "squad/adapter_config.json").is_file() and not (out / "model.safetensors").exists()


def test_an_adapter_learns_that_there_is_no_answer(run: Run, place: Path):
    rows = [made_up(2), made_up(3, id="none", question="who?", answers={"text": [], "answer_start": []})]
    write_rows(place / "v2.json", rows)
    write_rows(place / "test.json", [{name: row[name] for name in ("id", "question", "context")} for row in rows])
    files = (
        "--train_file v2.json --validation_file v2.json --test_file test.json --do_predict --version_2_with_negative"
    )
    out = run(f"{SHORT} {files} --learning_rate 3e-2", steps=80)
    assert results(out)["eval_loss"] < 4 and results(out)["eval_NoAns_exact"] == 100  # of some 6.4
    assert json.loads((out / "predict_predictions.json").read_text())["none"] == ""


def test_other_columns_and_answers_in_other_words(run: Run, place: Path):
    rows = [{"text": TEXT, "asked": f"what is {number}?", "right": "an answer of its own"} for number in range(4)]
    write_rows(place / "own.json", rows)
    names = "--context_column text --question_column asked --answer_column right"
    out = run(f"{SHORT} --train_file own.json --validation_file own.json {names}")
    assert json.loads((out / "eval_predictions.json").read_text()).keys() == {"0", "1", "2", "3"}


def test_a_resumed_run_ends_as_an_unbroken_one(run: Run, place: Path):
    line = f"{SHORT.replace('--overwrite_output_dir', '')} --save_steps 2"
    whole = run(line, steps=4)
    wanted = load_file(whole / "squad/adapter.safetensors")
    whole.rename(place / "WHOLE")
    (place / "OUT").mkdir()
    (place / "WHOLE/checkpoint-2").rename(place / "OUT/checkpoint-2")
    again = load_file(run(line, steps=4) / "squad/adapter.safetensors")
    assert wanted and all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("negative", [False, True])
def test_windows_hold_the_question_and_all_of_the_text(script: ModuleType, place: Path, negative: bool):
    tokenizer = AutoTokenizer.from_pretrained(place / "t5-small")
    text = f"{' '.join([TEXT] * 3)} It was Pete."
    row = {"id": "a", "question": " by whom?", "context": text, "answers": {"text": ["Pete"]}}
    options = script.DataTrainingArguments(
        train_file="x", max_seq_length=64, doc_stride=8, version_2_with_negative=negative, pad_to_max_length=False
    )
    windows = list(script.windows_of(row, tokenizer, options))
    assert len(windows) > 2 and all(window == f"question: by whom? context: {part}" for window, part in windows)
    joined = windows[0][1]
    for _, part in windows[1:]:
        overlap = next(size for size in range(len(part), 0, -1) if joined.endswith(part[:size]))
        joined += part[overlap:]
    assert joined == text
    data = Dataset.from_list([row])
    for split, number in {"train": len(windows) if negative else 1, "validation": len(windows)}.items():
        encoded = script.tokenize(data, split, tokenizer, options)
        assert encoded["row"][:] == [0] * number and all(len(ids) <= 64 for ids in encoded["input_ids"])
        answers = tokenizer.batch_decode(encoded["labels"][:], skip_special_tokens=True)
        assert answers[-1] == "Pete" and set(answers[:-1]) <= ({""} if negative else {"Pete"})


def test_the_best_answer_of_the_windows_is_chosen(script: ModuleType, place: Path):
    tokenizer = AutoTokenizer.from_pretrained(place / "t5-small")
    texts = tokenizer(["Paris", "Gustave", "", ""], padding=True, return_tensors="np")["input_ids"]
    windows = Dataset.from_dict({"row": [0, 0, 0, 1]})
    questions = Dataset.from_dict({"id": ["a", "b"]})
    outputs = np.where(texts == tokenizer.pad_token_id, -100, texts), np.array([-3.0, -2.0, -0.1, -1.0])
    assert script.choose_answers(outputs, windows, questions, tokenizer) == {"a": "Gustave", "b": ""}


MISTAKES = [
    ("--train_file nowhere.json", "nowhere.json: there is no such file"),
    ("--train_file empty.json", "empty.json: the file is empty"),
    ("--train_file latin.json", "latin.json: it is not UTF-8"),
    ("--train_file broken.json", "broken.json: it cannot be read as SQuAD's json"),
    ("--train_file missing.json", "question '0', has None as question, only id; it must be a text"),
    ("--train_file twice.json", "question '1': it is there twice"),
    ("--answer_column right", "has no right, only"),
    ("--do_predict", "There is no test data, only train, validation"),
    ("--doc_stride 60", "these must be more than doc_stride=60"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    (place / "empty.json").write_text("\n")
    (place / "latin.json").write_bytes('{"data": "für"}'.encode("latin-1"))
    (place / "broken.json").write_text('{"data": [')
    (place / "missing.json").write_text('{"data": [{"id": "0"}]}')
    write_rows(place / "twice.json", [made_up(1), made_up(1)])
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")
