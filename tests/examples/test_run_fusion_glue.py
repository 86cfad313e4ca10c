"""run_fusion_glue.py as a user starts it: adapters of the Hub's cache and of folders, GLUE's own files, mistakes."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from example_runs import DATA, Run, load_script, results, runner, write_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import adapters
from adapters.errors import AdapterError

# The command of README.md and of AdapterHub's page on training, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path bert-base-uncased --task_name SST-2 --do_train --do_eval --data_dir glue/SST-2 "
    "--max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 5e-5 --num_train_epochs 10.0 "
    "--overwrite_output_dir"
)
SHORT = "--model_name_or_path bert-base-uncased --do_train --do_eval --do_predict --adapters first b=second"
SNIPPETS = [("a fine film", 1), ("dull and long", 0), ("great fun", 1), ("a waste of time", 0)]
PAIRS = {
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ["1\t7\t8\ta film\tfilm", "0\t7\t8\ta\tdull"],
        {"acc", "f1"},
    ),
    "STS-B": ("index\tgenre\tsentence1\tsentence2\tscore", ["0\tg\ta\tfun\t2.5", "1\tg\tlong\ttime\t4.0"], {"pearson"}),
    "RTE": ("index\tsentence1\tsentence2\tlabel", ["0\ta\tb\tentailment", "1\ta\tb\tnot_entailment"], {"acc"}),
}


def snippets() -> list[tuple[str, int]]:
    """Sentences of film reviews that people have judged, where the data are there; else made-up ones."""
    file = DATA / "sentiment/movieReviewSnippets_GroundTruth.txt"
    if not file.is_file():
        return SNIPPETS * 16
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()[:80]]
    return [(text, int(float(score) > 0)) for _, score, text in rows]


def write_sst2(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = snippets()
    for name, part in {"train": rows[:60], "dev": rows[60:]}.items():
        lines = "".join(f"{text}\t{label}\n" for text, label in part)
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{lines}", "utf-8")
    lines = "".join(f"{number}\t{text}\n" for number, (text, _) in enumerate(rows[60:]))
    (folder / "test.tsv").write_text(f"index\tsentence\n{lines}", "utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, two adapters, and SST-2 as GLUE has it."""
    write_model(tmp_path / "bert-base-uncased", [text for text, _ in snippets()])
    write_sst2(tmp_path / "glue/SST-2")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert-base-uncased", num_labels=3)
    adapters.init(model)
    for name, folder in {"first": "first", "other": "second"}.items():
        model.add_adapter(name, "seq_bn[reduction_factor=4]")
        model.save_adapter(str(tmp_path / folder), name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("adapterfusion/run_fusion_glue.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run, place: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The adapters of the Hub stand in folders of these names, as the network is not there."""
    for number, task in enumerate(script.ADAPTERS.values()):
        (place / "AdapterHub").mkdir(exist_ok=True)
        (place / f"AdapterHub/bert-base-uncased-pf-{task}").symlink_to(place / ("first", "second")[number % 2])
    out = run(COMMAND)
    fused = next(path.parent for path in out.glob("*/adapter_fusion_config.json"))
    assert fused.name == ",".join(script.ADAPTERS)
    assert len(list(out.glob("*/adapter_config.json"))) == 15
    assert "acc" in {name.removeprefix("eval_") for name in results(out)}
    assert "eval_acc = " in (out / "eval_results_sst-2.txt").read_text()


def test_only_the_fusion_and_the_head_are_trained(run: Run, place: Path):
    out = run(f"{SHORT} --task_name sst-2 --data_dir glue/SST-2 --learning_rate 1e-2")
    assert json.loads((out / "b/adapter_config.json").read_text())["name"] == "b"
    before, after = (load_file(folder / "adapter.safetensors") for folder in (place / "first", out / "first"))
    assert all(before[key].equal(after[key]) for key in before)
    lines = (out / "test_results_sst-2.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction" and {line.split("\t")[1] for line in lines[1:]} <= {"0", "1"}


# An untrained model tells two sentences hardly apart.
@pytest.mark.filterwarnings("ignore:An input array is .*constant")
@pytest.mark.parametrize("task", PAIRS)
def test_tasks_of_other_kinds(run: Run, place: Path, task: str):
    header, rows, metrics = PAIRS[task]
    (place / "glue" / task).mkdir()
    for split in ("train", "dev"):
        (place / f"glue/{task}/{split}.tsv").write_text("\n".join([header, *rows]), "utf-8")
    options = SHORT.replace("--do_predict ", "")
    measured = results(run(f"{options} --task_name {task} --data_dir glue/{task} --fusion_config static"))
    assert {f"eval_{name}" for name in metrics} <= measured.keys()


MISTAKES = [
    ("--task_name sst3 --data_dir glue/SST-2", "task_name='sst3': no GLUE task"),
    ("--task_name sst-2 --data_dir nowhere", "data_dir='nowhere': there is no such folder"),
    ("--task_name rte --data_dir glue/SST-2", "has no column sentence1, only sentence, label"),
    ("--task_name sst-2 --data_dir empty", "There is no train data, only none"),
    ("--task_name sst-2 --data_dir glue/SST-2 --adapters first", "one cannot be fused"),
    ("--task_name sst-2 --data_dir glue/SST-2 --adapters first x/first", "two have the name 'first'"),
    ("--task_name sst-2 --data_dir glue/SST-2 --adapters first ./nowhere", "adapter 'nowhere': .* Name other adapters"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    (place / "empty").mkdir()
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")
