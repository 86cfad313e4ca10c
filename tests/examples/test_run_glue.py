"""run_glue.py as a user starts it: GLUE and own files, adapters and the whole model, stops and mistakes."""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from example_runs import DATA, SCRIPTS, Run, load_script, results, runner, write_model
from safetensors.torch import load_file

import adapters
from adapters import AutoAdapterModel
from adapters.errors import AdapterError

SCRIPT = SCRIPTS / "text-classification/run_glue.py"
SENTIMENT = DATA / "sentiment/movieReviewSnippets_GroundTruth.txt"
PAIRS = [
    ("the cat sat on the mat", "a cat was sitting on the mat", 1),
    ("he sold the old car", "she bought a small house", 0),
    ("shares rose five percent", "the stock went up by five percent", 1),
    ("rain fell in may", "the vote was in june", 0),
    ("the king died at dawn", "at dawn the king was dead", 1),
    ("we ate fish", "they won the cup", 0),
]
REVIEWS = [("a fine film", "good"), ("dull and long", "bad"), ("great fun", "good"), ("a waste of time", "bad")]


def pairs(labels: bool = True, times: int = 4) -> dict[str, list[Any]]:
    first, second, label = (list(column) * times for column in zip(*PAIRS, strict=True))
    return {"sentence1": first, "sentence2": second, "label": label if labels else [-1] * len(label)}


def write_glue(folder: Path, task: str = "mrpc") -> None:
    """A local copy of the task as the Hub has it."""
    (folder / task).mkdir(parents=True)
    names = ClassLabel(names=["not_equivalent", "equivalent"])
    for split in ("train", "validation", "test"):
        data = Dataset.from_dict(pairs(split != "test")).cast_column("label", names)
        data.to_parquet(folder / task / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model of the name bert-base-uncased and no network."""
    write_model(
        tmp_path / "bert-base-uncased", [text for one, two, _ in PAIRS for text in (one, two)] + [t for t, _ in REVIEWS]
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("text-classification/run_glue.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "--model_name_or_path bert-base-uncased --max_seq_length 16")


# --- the command of the documentation --------------------------------------------------------------------------------

COMMAND = (
    "--model_name_or_path bert-base-uncased --task_name mrpc --do_train --do_eval --max_seq_length 128 "
    "--per_device_train_batch_size 32 --learning_rate 1e-4 --num_train_epochs 10.0 --output_dir OUT "
    "--overwrite_output_dir --train_adapter --adapter_config seq_bn"
)


def start(place: Path, line: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the script as a process of its own, with no network."""
    source = str(Path(adapters.__file__).parents[1])
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, *python, str(SCRIPT), *line.split()]
    return subprocess.run(
        command, cwd=place, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A working directory where the command ran, over an output folder with content."""
    place = tmp_path_factory.mktemp("documented")
    write_model(place / "bert-base-uncased", [text for one, two, _ in PAIRS for text in (one, two)])
    write_glue(place / "glue")
    (place / "OUT").mkdir()
    (place / "OUT/old.txt").touch()
    return place, start(place, COMMAND)


def test_the_documented_command(documented: tuple[Path, subprocess.CompletedProcess[str]]):
    place, done = documented
    assert done.returncode == 0, done.stderr
    assert results(place / "OUT")["epoch"] == 10
    assert {"eval_accuracy", "eval_f1", "eval_combined_score", "eval_loss"} <= results(place / "OUT").keys()
    assert "10/10" in done.stderr, "a progress bar"
    files = {path.name for path in (place / "OUT").iterdir()}
    assert {"mrpc", "all_results.json", "train_results.json", "trainer_state.json", "README.md"} <= files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    model = AutoAdapterModel.from_pretrained(place / "bert-base-uncased")
    assert model.load_adapter(str(place / "OUT/mrpc"), set_active=True) == "mrpc"
    assert model.active_head == "mrpc" and model.get_labels() == ["not_equivalent", "equivalent"]


KILL_WHILE_SAVING = """
import os, runpy, signal, sys
from transformers import TrainerState
save = TrainerState.save_to_json
def killed(state, path):
    if state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
TrainerState.save_to_json = killed
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_goes_on_to_the_same_result(documented: tuple[Path, subprocess.CompletedProcess[str]]):
    place, _ = documented
    line = COMMAND.replace("--overwrite_output_dir", "--save_steps 2").replace("OUT", "AGAIN")
    assert start(place, line, ("-c", KILL_WHILE_SAVING)).returncode == -signal.SIGKILL
    assert (place / "AGAIN/checkpoint-6/mrpc").is_dir()
    resumed = start(place, line)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from AGAIN/checkpoint-4" in resumed.stdout
    for name in ("adapter.safetensors", "model_head.safetensors"):
        one, other = (load_file(place / folder / "mrpc" / name) for folder in ("OUT", "AGAIN"))
        assert one and all(torch.equal(one[key], other[key]) for key in one)
    assert results(place / "OUT")["eval_loss"] == results(place / "AGAIN")["eval_loss"]


@pytest.mark.skipif(not SENTIMENT.exists(), reason="the data folder is not here")
def test_real_reviews_are_learned(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [line.split("\t") for line in SENTIMENT.read_text("utf-8").splitlines()[::80]]
    data = Dataset.from_dict({"sentence": [r[2] for r in rows], "label": [int(float(r[1]) > 0) for r in rows]})
    DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "glue/SST-2")
    size = {"hidden_size": 64, "hidden_dropout_prob": 0.0, "initializer_range": 0.2}
    write_model(tmp_path / "bert-base-uncased", data["sentence"], **size)
    monkeypatch.chdir(tmp_path)
    line = (
        COMMAND.replace("mrpc", "sst2").replace("10.0", "25").replace("length 128", "length 32").replace("1e-4", "5e-3")
    )
    line = (
        line.replace("seq_bn", "double_seq_bn[reduction_factor=2]") + " --max_train_samples 100 --max_eval_samples 100"
    )
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *line.split(), "--use_cpu"])
    script.main()
    measured = results(tmp_path / "OUT")
    assert measured["eval_samples"] == 100
    assert measured["eval_accuracy"] > 0.85


# --- GLUE ------------------------------------------------------------------------------------------------------------

TASK_DATA: dict[str, tuple[list[str], list[Any], set[str]]] = {
    "cola": (["sentence"], [0, 1], {"matthews_correlation"}),
    "mrpc": (["sentence1", "sentence2"], [0, 1], {"accuracy", "f1", "combined_score"}),
    "qnli": (["question", "sentence"], [0, 1], {"accuracy"}),
    "qqp": (["question1", "question2"], [0, 1], {"accuracy", "f1", "combined_score"}),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"], {"accuracy"}),
    "sst2": (["sentence"], [0, 1], {"accuracy"}),
    "stsb": (["sentence1", "sentence2"], [0.5, 4.25], {"pearson", "spearmanr", "combined_score"}),
    "wnli": (["sentence1", "sentence2"], [0, 1], {"accuracy"}),
}


@pytest.mark.parametrize("task", TASK_DATA)
def test_every_task_has_its_columns_and_metrics(run: Run, place: Path, task: str):
    columns, labels, metrics = TASK_DATA[task]
    data = {"label": labels * 6, **{column: [one for one, *_ in PAIRS] * 2 for column in columns}}
    (place / "glue" / task).mkdir(parents=True)
    for split in ("train", "validation"):
        Dataset.from_dict(data).to_csv(place / "glue" / task / f"{split}.csv")
    measured = results(run(f"--task_name {task.upper()} --do_train --do_eval --train_adapter --adapter_config lora"))
    assert {f"eval_{name}" for name in metrics} <= measured.keys()


def test_mnli_has_two_validation_and_two_test_sets(run: Run, place: Path):
    folder = place / "copy/MNLI"
    folder.mkdir(parents=True)
    for number, split in enumerate(
        ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    ):
        label = [-1] * 3 if "test" in split else [0, 1, 2]
        data = {
            "premise": [one for one, *_ in PAIRS[:3]],
            "hypothesis": [two for _, two, _ in PAIRS[:3]],
            "label": label,
        }
        data = {name: column[: 3 - (number == 2)] for name, column in data.items()}
        Dataset.from_dict(data).to_json(folder / f"{split}.jsonl")
    out = run("--task_name mnli --data_dir copy --do_train --do_eval --do_predict --train_adapter")
    measured = results(out)
    assert (measured["eval_samples"], measured["eval_samples_mm"]) == (3, 2)
    assert {"eval_accuracy", "eval_accuracy_mm"} <= measured.keys()
    for name in ("mnli", "mnli-mm"):
        header, *lines = (out / f"predict_results_{name}.txt").read_text().splitlines()
        assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == ["0", "1", "2"]
        assert {line.split("\t")[1] for line in lines} <= {"entailment", "neutral", "contradiction"}


TSV = {
    "MRPC/train.tsv": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\ta "cat\tthe cat', "0\t9\t8\ta\tb"],
    "MRPC/dev.tsv": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\ta\tb"],
    "MRPC/test.tsv": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t7\t8\ta\tb"],
    "CoLA/train.tsv": ["gj04\t1\t\tthe cat", "gj04\t0\t*\tcat the"],
    "CoLA/dev.tsv": ["gj04\t1\t\tthe cat", "gj04\t0\t*\tcat the"],
    "CoLA/test.tsv": ["index\tsentence", "0\tthe cat"],
    "SST-2/train.tsv": ["sentence\tlabel", "good\t1", "bad\t0"],
    "SST-2/dev.tsv": ["sentence\tlabel", "good\t1"],
    "SST-2/test.tsv": ["index\tsentence", "0\tgood"],
    "STS-B/train.tsv": ["index\tgenre\tsentence1\tsentence2\tscore", "0\tg\ta\tb\t2.500", "1\tg\tb\tc\t4.000"],
    "STS-B/dev.tsv": ["index\tgenre\tsentence1\tsentence2\tscore", "0\tg\ta\tb\t5.000", "1\tg\ta\tc\t3.000"],
    "STS-B/test.tsv": ["index\tgenre\tsentence1\tsentence2", "0\tg\ta\tb"],
    "QQP/train.tsv": [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "0\t1\t2\ta\tb\t0",
        "1\t1",
        "2\t1\t2\ta\ta\t1",
    ],
    "QQP/dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\ta\tb\t1"],
    "QQP/test.tsv": ["id\tquestion1\tquestion2", "0\ta\tb"],
    "MNLI/train.tsv": [
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\ta\tb\tneutral\tneutral",
        "1\ta\tb\tx\tentailment",
    ],
    "MNLI/dev_matched.tsv": ["index\tsentence1\tsentence2\tlabel1\tgold_label", "0\ta\tb\tx\tcontradiction"],
    "MNLI/test_matched.tsv": ["index\tsentence1\tsentence2", "0\ta\tb"],
    "RTE/train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", "1\ta\tb\tnot_entailment"],
    "RTE/dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment"],
    "RTE/test.tsv": ["index\tsentence1\tsentence2", "0\ta\tb"],
}


# An untrained model tells two sentences hardly apart.
@pytest.mark.filterwarnings("ignore:An input array is .*constant")
@pytest.mark.parametrize("folder", sorted({name.split("/")[0] for name in TSV}))
def test_the_files_of_glue_itself(run: Run, place: Path, folder: str):
    for name in [name for name in TSV if name.startswith(folder)]:
        (place / "GLUE" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "GLUE" / name).write_text("\n".join(TSV[name]) + "\n", "utf-8")
    out = run(f"--task_name {folder} --data_dir GLUE --do_train --do_eval --do_predict --train_adapter")
    assert results(out, "train")["train_samples"] == 2
    assert results(out)["eval_samples"] == (2 if folder in ("STS-B", "CoLA") else 1)
    assert results(out, "predict")["predict_samples"] == 1


def test_a_folder_with_configurations_is_read_as_the_hub_would(run: Run, place: Path):
    write_glue(place / "glue", "data")
    card = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "validation", "test"))
    (place / "glue/README.md").write_text(f"---\nconfigs:\n- config_name: mrpc\n  data_files:\n{card}---\n")
    assert results(run("--task_name mrpc --do_eval --train_adapter"))["eval_samples"] == 24


# --- own files -------------------------------------------------------------------------------------------------------


def write_reviews(place: Path, extension: str, columns: dict[str, list[Any]]) -> str:
    """The columns as train, validation and test file, the last without labels; returns the options that name them."""
    for split in ("train", "validation", "test"):
        data = Dataset.from_dict({k: v for k, v in columns.items() if (k, split) != ("label", "test")})
        file = place / f"{split}.{extension}"
        if extension == "parquet":
            data.to_parquet(file)
        elif extension in ("json", "jsonl"):
            data.to_json(file)
        else:
            data.to_csv(file, sep="\t" if extension == "tsv" else ",")
    return " ".join(f"--{split}_file {split}.{extension}" for split in ("train", "validation", "test"))


@pytest.mark.parametrize("extension", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_of_every_kind(run: Run, place: Path, extension: str):
    columns = {"idx": list(range(4)), "label": [label for _, label in REVIEWS], "review": [text for text, _ in REVIEWS]}
    out = run(f"{write_reviews(place, extension, columns)} --do_train --do_eval --do_predict --train_adapter")
    assert "eval_accuracy" in results(out)
    lines = (out / "predict_results_glue.txt").read_text().splitlines()[1:]
    assert len(lines) == 4 and {line.split("\t")[1] for line in lines} <= {"good", "bad"}


@pytest.mark.parametrize("labels", [[3, 7, 3, 7], ["NA", "null", "NA", "null"], [True, False, True, False]])
def test_labels_of_every_kind_come_back(run: Run, place: Path, labels: list[Any]):
    files = write_reviews(place, "csv", {"text": [text for text, _ in REVIEWS], "label": labels})
    out = run(f"{files} --do_train --do_predict --train_adapter")
    lines = (out / "predict_results_glue.txt").read_text().splitlines()[1:]
    assert {line.split("\t")[1] for line in lines} <= set(map(str, labels))


def test_float_labels_are_a_regression(run: Run, place: Path):
    files = write_reviews(place, "csv", {"text": [text for text, _ in REVIEWS], "label": [0.5, 1.5, 0.25, 3.0]})
    out = run(f"{files} --do_train --do_eval --do_predict --train_adapter")
    assert "eval_mse" in results(out) and "eval_accuracy" not in results(out)
    values = [line.split("\t")[1] for line in (out / "predict_results_glue.txt").read_text().splitlines()[1:]]
    assert all(f"{float(value):.3f}" == value for value in values)


def test_labels_of_the_test_file_give_metrics(run: Run, place: Path):
    write_reviews(place, "csv", {"text": [text for text, _ in REVIEWS], "label": [label for _, label in REVIEWS]})
    out = run("--train_file train.csv --test_file validation.csv --do_train --do_predict --train_adapter")
    assert 0 <= results(out, "predict")["predict_accuracy"] <= 1


def test_chosen_columns_of_text(run: Run, place: Path, caplog: pytest.LogCaptureFixture):
    columns = {"title": list("abcd"), "body": [text for text, _ in REVIEWS], "label": [0, 1, 0, 1]}
    files = write_reviews(place, "csv", columns)
    with caplog.at_level("INFO"):
        run(f"{files} --do_eval --train_adapter --text_columns body")
        run(f"{files} --do_eval --train_adapter")
    assert "Text columns: body" in caplog.messages and "Text columns: title, body" in caplog.messages


def test_a_dataset_folder(run: Run, place: Path):
    write_glue(place / "mine", ".")
    assert results(run("--dataset_name mine --do_train --do_eval --train_adapter"))["eval_samples"] == 24


# --- modes -----------------------------------------------------------------------------------------------------------


def test_the_whole_model_is_trained_without_train_adapter(run: Run, place: Path):
    write_glue(place / "glue")
    out = run("--task_name mrpc --do_train --do_eval --learning_rate 1e-2")
    one, other = (load_file(folder / "model.safetensors") for folder in (place / "bert-base-uncased", out))
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(one[name], other[f"bert.{name}"])
    again = AutoAdapterModel.from_pretrained(out)
    assert again.get_labels("mrpc") == ["not_equivalent", "equivalent"]


@pytest.mark.parametrize("adapter", [True, False])
def test_a_trained_model_evaluates_alike_when_it_is_loaded_again(run: Run, place: Path, adapter: bool):
    write_glue(place / "glue")
    trained = results(run(f"--task_name mrpc --do_train --do_eval --learning_rate 1e-2 {'--train_adapter' * adapter}"))
    source = "--load_adapter OUT/mrpc --train_adapter" if adapter else "--model_name_or_path OUT"
    loaded = results(run(f"--task_name mrpc --do_eval {source}"))
    assert loaded["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)


def test_language_adapters_stay_below_and_frozen(run: Run, place: Path):
    write_glue(place / "glue")
    language = AutoAdapterModel.from_pretrained(place / "bert-base-uncased")
    language.add_adapter("en", "double_seq_bn")
    language.save_adapter(str(place / "en"), "en")
    out = run("--task_name mrpc --do_train --train_adapter --load_lang_adapter en --learning_rate 1e-2")
    one, other = (load_file(folder / "adapter.safetensors") for folder in (place / "en", out / "en"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (out / "mrpc/adapter_config.json").is_file()


def test_options_from_a_json_file(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    write_glue(place / "glue")
    options = {"model_name_or_path": "bert-base-uncased", "task_name": "mrpc", "output_dir": "OUT", "do_eval": True}
    (place / "options.json").write_text(json.dumps({**options, "use_cpu": True, "max_eval_samples": 5}))
    monkeypatch.setattr(sys, "argv", ["run_glue.py", "options.json"])
    script.main()
    assert results(place / "OUT")["eval_samples"] == 5


@pytest.mark.parametrize("split", ["train", "eval", "predict"])
def test_limits_of_samples(run: Run, place: Path, split: str):
    write_glue(place / "glue")
    out = run(f"--task_name mrpc --do_train --do_eval --do_predict --train_adapter --max_{split}_samples 5", steps=1)
    counted = {name: results(out, name)[f"{name}_samples"] for name in ("train", "eval", "predict")}
    assert counted == {name: 5 if name == split else 24 for name in counted}


def test_padding_to_the_batch(run: Run, place: Path):
    write_glue(place / "glue")
    options = "--task_name mrpc --do_train --do_eval --train_adapter"
    padded = results(run(f"{options} --no_pad_to_max_length"))
    assert "eval_accuracy" in padded


# --- mistakes --------------------------------------------------------------------------------------------------------

GOOD = [("text", "label"), ("a fine film", "good"), ("dull and long", "bad")]
MISTAKES: list[tuple[dict[str, list[tuple[str, ...]]], str, str]] = [
    ({}, "--do_train", "No data given"),
    ({}, "--task_name mrcp --do_train", "task_name='mrcp'"),
    ({}, "--train_file a.csv --do_train", r"a\.csv: there is no such file"),
    ({}, "--task_name mrpc --data_dir nowhere --do_train", "data_dir='nowhere': there is no such folder"),
    ({"a.txt": GOOD}, "--train_file a.txt --do_train", r"a\.txt: its extension is '\.txt'"),
    ({"a": GOOD}, "--train_file a --do_train", "a: its extension is ''"),
    ({"a.csv": []}, "--train_file a.csv --do_train", r"a\.csv: the file is empty"),
    ({"a.csv": GOOD[:1]}, "--train_file a.csv --do_train", r"a\.csv: it has no rows"),
    ({"a.csv": GOOD}, "--train_file a.csv --do_train --do_eval", "There is no validation data, only train"),
    ({"a.csv": [("text",), ("fine",)]}, "--train_file a.csv --do_train", "train data has no column label, only text"),
    ({"a.csv": [("label",), ("1",)]}, "--train_file a.csv --do_train", "0 columns of text among label"),
    ({"a.csv": GOOD}, "--train_file a.csv --do_train --text_columns body", "has no column body, only text, label"),
    ({"a.csv": [*GOOD, ("", "bad")]}, "--train_file a.csv --do_train", "has no text in row 3"),
    ({"a.csv": [*GOOD, ("well", "")]}, "--train_file a.csv --do_train", "has no label in row 3"),
    (
        {"a.csv": GOOD, "b.csv": [*GOOD, ("well", "soso")]},
        "--train_file a.csv --validation_file b.csv --do_train --do_eval",
        "validation data has the label 'soso'.* one of bad, good",
    ),
    (
        {"a.csv": GOOD, "b.csv": [("review", "label"), ("fine", "good")]},
        "--train_file a.csv --validation_file b.csv --do_train --do_eval",
        "validation data has no column text, only review, label",
    ),
    (
        {"OUT/notes.txt": []},
        "--task_name mrpc --do_train",
        "is not empty and has no checkpoint.*--overwrite_output_dir",
    ),
    ({"a.json": [("{", "")]}, "--train_file a.json --do_train", r"a\.json: it cannot be read as json"),
]


@pytest.mark.parametrize(("files", "line", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_mistakes_are_told_before_anything_is_loaded(
    run: Run, place: Path, script: ModuleType, files: Any, line: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    for name, rows in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        with (place / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    monkeypatch.setattr(script, "load_tokenizer_and_model", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(AdapterError, match=message):
        run(f"{line} --train_adapter")


def test_a_mistake_ends_the_script_with_one_line(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *COMMAND.replace("mrpc", "nope").split()])
    with pytest.raises(SystemExit, match=r"^run_glue\.py: task_name='nope'.*\.$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_no_data_and_no_network(run: Run, monkeypatch: pytest.MonkeyPatch, script: ModuleType):
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(script, "load_dataset", unreachable)
    with pytest.raises(AdapterError, match=r"neither glue/rte nor the Hub has the data.*--data_dir"):
        run("--task_name rte --do_train --train_adapter")
