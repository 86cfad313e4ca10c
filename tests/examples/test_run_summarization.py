"""run_summarization.py as a user starts it: files and columns, ROUGE, predictions, a resumed run, mistakes."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_runs import Run, load_script, results, runner
from safetensors.torch import load_file
from seq2seq_material import articles, write_rows
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, EvalPrediction

from adapters.errors import AdapterError

# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path t5-small --train_file train.json --validation_file dev.json --do_train --do_eval "
    "--source_prefix summarize: --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --predict_with_generate "
    "--train_adapter --adapter_config seq_bn --overwrite_output_dir"
)
SHORT = f"{COMMAND} --max_source_length 48 --max_target_length 8"


@pytest.fixture
def place(tmp_path: Path, small_t5: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, articles with their headlines, and no network."""
    shutil.copytree(small_t5, tmp_path / "t5-small")
    write_rows(tmp_path / "train.json", articles()[:40])
    write_rows(tmp_path / "dev.json", articles()[-6:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("summarization/run_summarization.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run, place: Path):
    (place / "test.json").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in articles()[-4:]))
    out = run(f"{COMMAND} --max_train_samples 16 --max_eval_samples 4 --do_predict --test_file test.json")
    measured = results(out)
    assert {
        f"eval_{name}" for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "gen_len", "loss")
    } <= measured.keys()
    assert results(out, "train")["train_samples"] == 16 and measured["eval_samples"] == 4
    assert len((out / "generated_predictions.txt").read_text("utf-8").splitlines()) == 4
    assert "predict_rouge1" not in results(out, "predict")  # these texts have no summaries
    assert (out / "summarization/adapter_config.json").is_file() and not (out / "model.safetensors").exists()


def test_an_adapter_learns_and_is_loaded_again(run: Run, place: Path):
    write_rows(place / "one.json", [{"body": articles()[0]["text"], "headline": "the tower is high"}] * 4)
    line = f"{SHORT} --train_file one.json --validation_file one.json --text_column body --summary_column headline"
    trained = results(run(f"{line} --learning_rate 3e-2", steps=60))
    assert trained["eval_loss"] < 4  # of some 6.4
    (place / "OUT").rename(place / "before")
    loaded = results(run(f"{line.replace('--do_train ', '')} --load_adapter before/summarization"))
    assert loaded["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-4)


def test_tables_and_padding(run: Run, place: Path):
    Dataset.from_list(articles()[:6]).to_csv(place / "table.csv")
    Dataset.from_list(articles()[:6]).to_parquet(place / "table.parquet")
    line = f"{SHORT} --train_file table.csv --validation_file table.parquet --max_target_length 40"
    padded = results(run(f"{line} --pad_to_max_length --num_beams 2"))["eval_loss"]
    counted = results(run(f"{line} --pad_to_max_length --no_ignore_pad_token_for_loss"))["eval_loss"]
    assert padded == pytest.approx(results(run(line))["eval_loss"], abs=0.05)
    assert abs(counted - padded) > 0.05


def test_a_resumed_run_ends_as_an_unbroken_one(run: Run, place: Path, caplog: pytest.LogCaptureFixture):
    line = f"{SHORT.replace('--overwrite_output_dir', '')} --save_steps 2"
    whole = run(line, steps=4)
    wanted = load_file(whole / "summarization/adapter.safetensors")
    whole.rename(place / "WHOLE")
    (place / "OUT").mkdir()
    (place / "WHOLE/checkpoint-2").rename(place / "OUT/checkpoint-2")
    caplog.set_level("INFO")
    again = load_file(run(line, steps=4) / "summarization/adapter.safetensors")
    assert "Resuming from OUT/checkpoint-2" in caplog.text
    assert wanted and all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_metrics_compare_texts(script: ModuleType, place: Path):
    tokenizer = AutoTokenizer.from_pretrained(place / "t5-small")
    found, right = (tokenizer(text_target=["the tower. it is high"])["input_ids"] for _ in range(2))
    predictions = np.array([[0, *found[0], -100, -100]])
    measured = script.build_metrics(tokenizer)(EvalPrediction(predictions=predictions, label_ids=np.array(right)))
    assert all(measured[name] == 100 for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"))
    assert measured["gen_len"] == len(found[0])
    assert script.sentences("One. Two? Three") == "One.\nTwo?\nThree"


def test_a_dataset_has_its_columns(script: ModuleType):
    data = Dataset.from_dict({"id": ["1"], "article": ["x"], "highlights": ["y"]})
    options = script.DataTrainingArguments(dataset_name="abisee/cnn_dailymail")
    assert script.choose_columns(data, options) == ("article", "highlights")
    assert script.choose_columns(data, script.DataTrainingArguments(train_file="x")) == ("id", "article")


def test_positions(script: ModuleType):
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20, "max_position_embeddings": 32}
    model = BartForConditionalGeneration(BartConfig(**size, encoder_attention_heads=2, decoder_attention_heads=2))
    model_args = script.ModelArguments("x")
    script.fit_lengths(model, model_args, script.DataTrainingArguments(train_file="x", max_source_length=32))
    for resize, message in {
        None: "cannot be made to take more",
        False: "it must be no more. Lower it, or pass",
    }.items():
        model_args.resize_position_embeddings = resize
        with pytest.raises(AdapterError, match=message):
            script.fit_lengths(model, model_args, script.DataTrainingArguments(train_file="x", max_source_length=33))


MISTAKES = [
    ("--train_file nowhere.json", "nowhere.json: there is no such file"),
    ("--train_file empty.json", "empty.json: the file is empty"),
    ("--train_file latin.csv", "latin.csv: it cannot be read as csv"),
    ("--train_file train.docx", "its extension is '.docx'"),
    ("--train_file gap.json", "row 2, has None as summary; it must be a text"),
    ("--summary_column story", "no column story, only text, summary; name it with --text_column or --summary_column"),
    ("--do_predict", "There is no test data, only train, validation"),
    ("--max_eval_samples 0", "The validation data is empty"),
    ("--forced_bos_token nowhere", "forced_bos_token='nowhere': the tokenizer has no such token"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    (place / "empty.json").write_text("")
    (place / "latin.csv").write_bytes("text,summary\nfür,x\n".encode("latin-1"))
    (place / "gap.json").write_text('{"text": "a", "summary": "b"}\n{"text": "a", "summary": null}\n')
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")
