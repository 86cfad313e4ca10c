"""run_ner.py as a user starts it: CoNLL files and tables, tags of words, mistakes."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from datasets import Dataset
from example_runs import DATA, Run, load_script, results, runner, write_model
from transformers import AutoModelForTokenClassification, AutoTokenizer

import adapters
from adapters.errors import AdapterError

MADE_UP = [("Alice B-person", "met O", "Bob B-person", "Smith I-person", "in O", "Rome B-location")] * 12
# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path bert-base-uncased --train_file wnut17train.conll --validation_file emerging.dev.conll "
    "--do_train --do_eval --train_adapter --adapter_config seq_bn --overwrite_output_dir"
)
SHORT = f"{COMMAND} --max_seq_length 32"
FILES = {"wnut17train.conll": 600, "emerging.dev.conll": 12, "emerging.test.annotated": 12}


def sentences(name: str, number: int) -> str:
    """The first sentences of the file of WNUT-17, where it is there; else made-up ones."""
    file = DATA / "ner" / name
    if not file.is_file():
        return "\n\n".join("\n".join(line.replace(" ", "\t") for line in lines) for lines in MADE_UP) + "\n"
    blocks = file.read_text("utf-8").replace("\n\t\n", "\n\n").split("\n\n")
    return "\n\n".join(blocks[:number]) + "\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, files of tagged sentences, and no network."""
    for name, number in FILES.items():
        (tmp_path / name).write_text(sentences(name, number), "utf-8")
    words = [line.split("\t")[0] for line in sentences("wnut17train.conll", 60).splitlines() if line]
    write_model(tmp_path / "bert-base-uncased", [*words[::2], "[", "]", "@", "#", ".", "a", "e", "##s", "##on", "##l"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("token-classification/run_ner.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run, place: Path):
    out = run(f"{COMMAND} --max_train_samples 40 --do_predict --test_file emerging.test.annotated")
    measured = results(out)
    assert {f"eval_{name}" for name in ("precision", "recall", "f1", "accuracy")} <= measured.keys()
    assert len((out / "predictions.txt").read_text().splitlines()) == 12
    head = json.loads((out / "ner/head_config.json").read_text())
    model = AutoModelForTokenClassification.from_pretrained(
        place / "bert-base-uncased", num_labels=len(head["label2id"])
    )
    adapters.init(model)
    assert model.load_adapter(str(out / "ner")) == "ner"


def test_predictions_are_the_tags_of_words(run: Run, place: Path):
    out = run(
        f"{SHORT} --max_train_samples 40 --do_predict --test_file emerging.test.annotated --return_entity_level_metrics"
    )
    given = [block.splitlines() for block in sentences("emerging.test.annotated", 12).strip().split("\n\n")]
    predicted = [line.split() for line in (out / "predictions.txt").read_text().splitlines()]
    assert all(1 <= len(tags) <= len(words) for tags, words in zip(predicted, given, strict=True))
    assert any(name.startswith("predict_person") for name in results(out, "predict"))


def test_each_word_has_the_tag_at_its_first_token(script: ModuleType, place: Path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "al", "##ice", "met", "bob"]
    (place / "words").mkdir()
    (place / "words/vocab.txt").write_text("\n".join(vocabulary))
    (place / "words/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(place / "words")
    tags = ["B-person", "I-person", "O"]
    data = Dataset.from_dict({"tokens": [["alice", "met", "bob"]], "labels": [[0, 2, 0]]})
    for every, wanted in {False: [-100, 0, -100, 2, 0, -100], True: [-100, 0, 1, 2, 0, -100]}.items():
        options = script.DataTrainingArguments(train_file="x", label_all_tokens=every)
        assert script.tokenize(data, "tokens", tags, tokenizer, options)[0]["labels"] == wanted


def test_metrics_count_whole_names(script: ModuleType):
    tags = ["B-person", "I-person", "O"]
    right = np.array([[-100, 0, 1, 2, 0, -100]])
    scores = np.eye(3)[np.array([[0, 0, 2, 2, 0, 0]])]  # the first name is cut short
    measured = script.build_metrics(tags, True)(script.EvalPrediction(predictions=scores, label_ids=right))
    assert (measured["precision"], measured["recall"], measured["f1"]) == (0.5, 0.5, 0.5)
    assert measured["accuracy"] == 0.75 and measured["person_f1"] == 0.5


@pytest.mark.parametrize("extension", ["json", "parquet"])
def test_tables(run: Run, place: Path, extension: str):
    table = Dataset.from_dict({"words": [["a", "b"], ["c"]] * 4, "pos_tags": [["X", "Y"], ["Y"]] * 4})
    for name in ("train", "validation"):
        file = place / f"{name}.{extension}"
        table.to_json(file) if extension == "json" else table.to_parquet(file)
    out = run(
        f"--model_name_or_path bert-base-uncased --task_name POS --text_column_name words --do_train --do_eval "
        f"--train_file train.{extension} --validation_file validation.{extension} --train_adapter"
    )
    assert (out / "pos/adapter_config.json").is_file() and results(out)["eval_samples"] == 8


MISTAKES = [
    ("", "bad", "", "bad, sentence 2: 'word' has no tag"),
    ("--text_column_name story", "wnut17train.conll", "", "no column story, only tokens, tags"),
    ("", "nowhere", "", "nowhere: there is no such file"),
    ("", "latin", "", "latin: it is not UTF-8"),
    ("--do_predict", "wnut17train.conll", "", "There is no test data, only train, validation"),
    ("", "wnut17train.conll", "unseen", "tag 'B-planet', which is not one of training"),
    ("", "uneven.json", "", "row 1: there must be a list of words and one of as many tags"),
]


@pytest.mark.parametrize(("line", "train", "validation", "message"), MISTAKES, ids=[row[-1] for row in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, train: str, validation: str, message: str):
    (place / "bad").write_text("a\tO\n\nword\n")
    (place / "latin").write_bytes("für\tO\n".encode("latin-1"))
    (place / "unseen").write_text("Mars\tB-planet\n")
    (place / "uneven.json").write_text('{"tokens": ["a", "b"], "tags": ["O"]}\n')
    files = f"--train_file {train}" + (f" --validation_file {validation}" if validation else "")
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {files} {line}")
