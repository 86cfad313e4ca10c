"""run_qa.py as a user starts it: SQuAD's files, windows, answers and metrics, a resumed run, mistakes."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_runs import DATA, SCRIPTS, Run, load_script, results, runner, write_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from adapters.errors import AdapterError

# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path bert-base-uncased --train_file train-v1.1.json --validation_file dev-v1.1.json --do_train "
    "--do_eval --per_device_train_batch_size 12 --learning_rate 3e-5 --num_train_epochs 2 --max_seq_length 384 "
    "--doc_stride 128 --train_adapter --adapter_config seq_bn --overwrite_output_dir"
)
SHORT = f"{COMMAND.replace('384', '64').replace('stride 128', 'stride 16')} --max_train_samples 12 --max_eval_samples 6"
TEXT = "The tower in Paris was built by Gustave Eiffel for the fair of 1889 , and it is 330 metres high ."


def made_up(number: int) -> dict[str, Any]:
    answer = TEXT.split()[number % 20]
    answers = [{"text": answer, "answer_start": TEXT.index(answer)}]
    return {"id": str(number), "question": f"which word is number {number} ?", "answers": answers}


def squad() -> dict[str, Any]:
    """The first article of XQuAD, where it is there; else a made-up one."""
    file = DATA / "qa/xquad.en.json"
    if not file.is_file():
        return {"version": "1.1", "data": [{"paragraphs": [{"context": TEXT, "qas": list(map(made_up, range(20)))}]}]}
    content = json.loads(file.read_text("utf-8"))
    return {**content, "data": content["data"][:1]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, files of questions, and no network."""
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / name).write_text(json.dumps(squad()), "utf-8")
    texts = [paragraph["context"] for article in squad()["data"] for paragraph in article["paragraphs"]]
    write_model(tmp_path / "bert-base-uncased", texts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("question-answering/run_qa.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\n".join(json.dumps({"context": TEXT, **row}) for row in rows) + "\n", "utf-8")


def test_the_command_of_the_page(run: Run, place: Path):
    tokenizer = AutoTokenizer.from_pretrained(place / "bert-base-uncased", model_max_length=128)
    tokenizer.save_pretrained(place / "bert-base-uncased")
    short = COMMAND.replace("stride 128", "stride 32") + " --max_train_samples 12 --max_eval_samples 6"
    out = run(f"{short} --do_predict --test_file dev-v1.1.json --max_predict_samples 5")
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= results(out).keys() and results(out)["eval_samples"] == 6
    for kind, number in {"eval": 6, "predict": 5}.items():
        answers = json.loads((out / f"{kind}_predictions.json").read_text("utf-8"))
        n_best = json.loads((out / f"{kind}_nbest_predictions.json").read_text("utf-8"))
        assert len(answers) == number and answers == {name: best[0]["text"] for name, best in n_best.items()}
        assert all(abs(sum(answer["probability"] for answer in best) - 1) < 1e-5 for best in n_best.values())
    assert (out / "squad/adapter_config.json").is_file() and not (out / "eval_null_odds.json").exists()


def test_questions_without_an_answer(run: Run, place: Path):
    rows = [made_up(number) for number in range(1, 5)] + [{"id": "0", "question": "who ?", "answers": []}]
    write_table(place / "v2.json", rows)
    files = "--train_file v2.json --validation_file v2.json --test_file v2.json --do_predict --max_predict_samples 5"
    out = run(f"{SHORT} {files} --version_2_with_negative --null_score_diff_threshold -1000 --no_pad_to_max_length")
    assert results(out)["eval_NoAns_total"] == 1 and results(out)["eval_exact"] == pytest.approx(20)
    odds = json.loads((out / "eval_null_odds.json").read_text())
    assert odds.keys() == {row["id"] for row in rows}


def test_a_resumed_run_ends_as_an_unbroken_one(run: Run, place: Path, caplog: pytest.LogCaptureFixture):
    line = f"{SHORT.replace('--overwrite_output_dir', '')} --save_steps 2 --per_device_train_batch_size 4"
    whole = run(line, steps=4)
    wanted = load_file(whole / "squad/adapter.safetensors")
    whole.rename(place / "WHOLE")
    (place / "OUT").mkdir()
    (place / "WHOLE/checkpoint-2").rename(place / "OUT/checkpoint-2")
    caplog.set_level("INFO")
    again = load_file(run(line, steps=4) / "squad/adapter.safetensors")
    assert "Resuming from OUT/checkpoint-2" in caplog.text
    assert wanted and all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_hold_the_answer_or_nothing(script: ModuleType, place: Path, side: str):
    tokenizer = AutoTokenizer.from_pretrained(place / "bert-base-uncased", padding_side=side)
    text = " ".join([TEXT] * 3)
    answer = {"text": ["Gustave Eiffel"], "answer_start": [text.rindex("Gustave")]}
    data = Dataset.from_dict({"id": ["a"], "question": [" by whom ?"], "context": [text], "answers": [answer]})
    options = script.DataTrainingArguments(train_file="x", max_seq_length=40, doc_stride=8)
    windows = list(script.tokenize(data, tokenizer, options))
    spans = [(w["offsets"][w["start_positions"]], w["offsets"][w["end_positions"]]) for w in windows]
    found = [text[first[0] : last[1]] for first, last in spans if first is not None]
    assert len(windows) > 2 and found and set(found) == {"Gustave Eiffel"} and (None, None) in spans
    # Scores that point at the labels give the answer back, and its text scores full marks.
    scores = [np.eye(40)[[w[name] for w in windows]] * 9 for name in ("start_positions", "end_positions")]
    scores = [part * np.array([[2.0] if span[0] else [1.0] for span in spans]) for part in scores]
    answers, _, odds = script.choose_answers(tuple(scores), windows, data, tokenizer, options)
    assert answers == {"a": "Gustave Eiffel"} and odds["a"] == -36
    assert script.measure(answers, data, False) == {"exact_match": 100.0, "f1": 100.0}


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1"),
    [("The Beatles!", ["beatles"], 100, 100), ("a b c", ["b c d", "x"], 0, 80), ("", ["x"], 0, 0), ("x", [], 0, 0)],
)
def test_metrics_are_those_of_squad(script: ModuleType, answer: str, right: list[str], exact: float, f1: float):
    data = [{"id": "a", "answers": {"text": right}}]
    measured = script.measure({"a": answer}, data, True)
    assert (measured["exact"], measured["f1"]) == (exact, pytest.approx(f1))


@pytest.mark.parametrize("kind", ["list", "data", "lines", "one line"])
def test_flat_files(script: ModuleType, tmp_path: Path, kind: str):
    rows = [{"context": TEXT, **made_up(number)} for number in range(1 if kind == "one line" else 3)]
    content = {"list": json.dumps(rows, indent=1), "data": json.dumps({"data": rows})}
    file = tmp_path / "table.json"
    file.write_text(content.get(kind, "\n".join(map(json.dumps, rows))), "utf-8")
    assert script.read_file(file)[0]["answers"] == {"text": ["The"], "answer_start": [0]}
    assert len(script.read_file(file)) == len(rows)


def test_the_old_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["run_squad.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(SCRIPTS / "question-answering/run_squad.py"), run_name="__main__")
    assert "--version_2_with_negative" in capsys.readouterr().out


MISTAKES = [
    ("--train_file nowhere.json", "nowhere.json: there is no such file"),
    ("--train_file empty.json", "empty.json: the file is empty"),
    ("--train_file latin.json", "latin.json: it is not UTF-8"),
    ("--train_file broken.json", "broken.json: it cannot be read as SQuAD's json"),
    ("--train_file missing.json", "missing.json: a question has no 'question'"),
    ("--train_file moved.json", "the answer 'Paris' is not at 3"),
    ("--train_file none.json", "question '0': it has no answer"),
    ("--train_file twice.json", "question '0': it is there twice"),
    ("--do_predict", "There is no test data, only train, validation"),
    ("--doc_stride 60", "it must have fewer than 1"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    (place / "empty.json").write_text("\n")
    (place / "latin.json").write_bytes('{"data": "für"}'.encode("latin-1"))
    (place / "broken.json").write_text('{"data": [')
    (place / "missing.json").write_text('{"data": [{"id": "0"}]}')
    write_table(place / "moved.json", [{**made_up(0), "answers": {"text": ["Paris"], "answer_start": [3]}}])
    write_table(place / "none.json", [{**made_up(0), "answers": []}])
    write_table(place / "twice.json", [made_up(0), made_up(0)])
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")
