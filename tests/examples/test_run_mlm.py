"""run_mlm.py as a user starts it: text files and tables, packed and by line, whole words, streams, from scratch."""

import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from example_runs import Run, load_script, results, runner, write_model
from transformers import AutoModelForMaskedLM, BertTokenizer

import adapters
from adapters.errors import AdapterError

SENTENCES = [
    "the striker scored in the last minute of the final",
    "shares in the bank fell after the report",
    "the minister said the vote would be held in may",
    "the new phone has a camera on the back",
]
# The command of README.md and of AdapterHub's page on training, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path bert-base-uncased --train_file train --validation_file validation --do_train --do_eval "
    '--learning_rate 1e-4 --num_train_epochs 10.0 --train_adapter --adapter_config "seq_bn_inv"'
)
SHORT = "--model_name_or_path bert-base-uncased --do_train --do_eval --train_adapter --max_seq_length 16"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, the files train and validation, and no network."""
    write_model(tmp_path / "bert-base-uncased", SENTENCES)
    (tmp_path / "train").write_text("\n".join(SENTENCES * 20) + "\n\n", "utf-8")
    (tmp_path / "validation").write_text("\n".join(SENTENCES * 8), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("language-modeling/run_mlm.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page_trains_a_language_adapter(run: Run, place: Path):
    out = run(" ".join(shlex.split(COMMAND)))
    measured = results(out)
    assert measured["perplexity"] == pytest.approx(torch.tensor(measured["eval_loss"]).exp().item(), rel=1e-5)
    assert 0 <= measured["eval_accuracy"] <= 1
    assert json.loads((out / "mlm/adapter_config.json").read_text())["config"]["inv_adapter"] == "nice"
    model = AutoModelForMaskedLM.from_pretrained(place / "bert-base-uncased")
    adapters.init(model)
    assert model.load_adapter(str(out / "mlm"), set_active=True) == "mlm"
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    ["--line_by_line", "--line_by_line --pad_to_max_length", "--whole_word_mask", "--line_by_line --whole_word_mask"],
)
def test_forms_of_examples(run: Run, options: str):
    measured = results(run(f"{SHORT} --train_file train --validation_file validation {options}"))
    lines, pieces = 32, sum(len(text.split()) + 2 for text in SENTENCES) * 8 // 16
    assert measured["eval_samples"] == (lines if "line_by_line" in options else pieces)


def test_masks_cover_whole_words(script: ModuleType, place: Path):
    vocabulary = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing"])
    }
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=64)
    options = script.DataTrainingArguments(train_file="train", whole_word_mask=True, mlm_probability=0.3)
    text = Dataset.from_dict({"text": ["playing play playing playing"] * 50})
    rows = list(script.tokenize({"train": text}, "text", 9, tokenizer, options)["train"])
    masked = script.build_collator(tokenizer, options)(rows)["labels"] != -100
    ids = torch.tensor([row["input_ids"] for row in rows])
    later = ids[:, 1:] == vocabulary["##ing"]
    assert later.any() and torch.equal(masked[:, 1:][later], masked[:, :-1][later])
    assert 0.1 < masked.float().mean() < 0.5


@pytest.mark.parametrize("extension", ["txt", "json", "csv"])
def test_files_of_every_kind(run: Run, place: Path, extension: str):
    for name in ("train", "validation"):
        lines = (place / name).read_text().split("\n")
        texts = [text for text in lines if text]
        content = {
            "txt": "\n".join(texts),
            "json": "\n".join(json.dumps({"id": number, "body": text}) for number, text in enumerate(texts)),
            "csv": "id,body\n" + "\n".join(f"{number},{text}" for number, text in enumerate(texts)),
        }
        (place / f"{name}.{extension}").write_text(content[extension])
    files = f"--train_file train.{extension} --validation_file validation.{extension}"
    assert results(run(f"{SHORT} {files}"), "train")["train_samples"] > 0


def test_a_share_of_the_training_data_is_held_out(run: Run):
    out = run(f"{SHORT} --train_file train --line_by_line --validation_split_percentage 10")
    assert (results(out)["eval_samples"], results(out, "train")["train_samples"]) == (8, 72)


def test_streams(run: Run):
    out = run(f"{SHORT} --train_file train --validation_file validation --streaming --max_eval_samples 5")
    assert results(out)["eval_loss"] > 0


def test_a_model_from_scratch(run: Run, place: Path):
    size = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=64"
    out = run(
        "--model_type bert --tokenizer_name bert-base-uncased --train_file train --do_train "
        f"--max_seq_length 16 --config_overrides {size} --learning_rate 1e-2"
    )
    assert AutoModelForMaskedLM.from_pretrained(out).config.hidden_size == 32


def test_a_trained_adapter_is_loaded_to_evaluate(run: Run, place: Path):
    line = f"{SHORT} --train_file train --validation_file validation --prediction_loss_only --learning_rate 1e-2"
    trained = results(run(line, steps=40))["eval_loss"]
    (place / "OUT").rename(place / "before")
    only = line.replace("--do_train ", "")
    loaded, fresh = results(run(f"{only} --load_adapter before/mlm"))["eval_loss"], results(run(only))["eval_loss"]
    assert abs(loaded - trained) < 0.4 * (fresh - trained)  # the masks are drawn anew


MISTAKES = [
    ("", "No data given"),
    ("--train_file nowhere", "nowhere: there is no such file"),
    ("--train_file empty", "empty: the file is empty"),
    ("--train_file latin", "latin: it is not UTF-8"),
    ("--validation_file validation", "There is no train data, only validation"),
    ("--train_file train --mlm_probability 2", "mlm_probability=2.0: it must lie between 0 and 1"),
    ("--train_file t.csv --text_column story", "no column of text story, only a; name one"),
    ("--train_file train --streaming", "streamed data cannot be split"),
    ("--train_file one", "one row cannot be split"),
    ("--train_file one --validation_file one", "has no example of 16 tokens"),
    ("--train_file train --config_overrides a=1", "they are for a model from scratch"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    for name, content in {"empty": b"", "latin": "für".encode("latin-1"), "t.csv": b"a\nx\ny\n", "one": b"the"}.items():
        (place / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")
