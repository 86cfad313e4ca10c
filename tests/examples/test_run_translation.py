"""run_translation.py as a user starts it: files, languages, BLEU, predictions, a resumed run, mistakes."""

import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_runs import Run, load_script, results, runner
from safetensors.torch import load_file
from seq2seq_material import translations, write_rows
from transformers import AutoTokenizer, EvalPrediction

from adapters.errors import AdapterError

# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path t5-small --train_file en-de-train.json --validation_file en-de-dev.json --do_train --do_eval "
    "--source_lang en --target_lang de --per_device_train_batch_size 4 --per_device_eval_batch_size 4 "
    "--predict_with_generate --train_adapter --adapter_config seq_bn --overwrite_output_dir"
)
SHORT = f"{COMMAND} --max_source_length 24 --max_target_length 12"


@pytest.fixture
def place(tmp_path: Path, small_t5: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, questions in two languages, and no network."""
    shutil.copytree(small_t5, tmp_path / "t5-small")
    write_rows(tmp_path / "en-de-train.json", translations()[:24])
    write_rows(tmp_path / "en-de-dev.json", translations()[-6:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("translation/run_translation.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page(run: Run):
    line = f"{COMMAND} --max_train_samples 16 --max_eval_samples 4 --do_predict --test_file en-de-dev.json"
    out = run(f"{line} --max_predict_samples 5")
    assert {"eval_bleu", "eval_gen_len", "eval_loss"} <= results(out).keys() and results(out)["eval_samples"] == 4
    assert "predict_bleu" in results(out, "predict")
    assert len((out / "generated_predictions.txt").read_text("utf-8").splitlines()) == 5
    assert (out / "en_de/adapter_config.json").is_file() and not (out / "model.safetensors").exists()


def test_columns_of_languages_and_no_translations(run: Run, place: Path):
    pairs = [row["translation"] for row in translations()[:6]]
    Dataset.from_list(pairs).to_csv(place / "pairs.csv")
    write_rows(place / "test.json", [{"translation": {"en": pair["en"]}} for pair in pairs])
    line = SHORT.replace("lang en", "lang en_XX").replace("lang de", "lang de_DE")
    files = "--train_file pairs.csv --validation_file pairs.csv --test_file test.json --do_predict"
    out = run(f"{line} {files}")
    assert (out / "en_de/adapter_config.json").is_file() and results(out)["eval_samples"] == 6
    assert "predict_bleu" not in results(out, "predict")
    assert len((out / "generated_predictions.txt").read_text("utf-8").splitlines()) == 6


def test_the_whole_model_is_trained_without_an_adapter(run: Run):
    line = SHORT.replace("--train_adapter --adapter_config seq_bn", "").replace("--predict_with_generate", "")
    out = run(line)
    assert (out / "model.safetensors").is_file() and not (out / "en_de").exists()
    assert "eval_bleu" not in results(out) and results(out)["eval_loss"] > 0


def test_a_resumed_run_ends_as_an_unbroken_one(run: Run, place: Path):
    line = f"{SHORT.replace('--overwrite_output_dir', '')} --save_steps 2"
    whole = run(line, steps=4)
    wanted = load_file(whole / "en_de/adapter.safetensors")
    whole.rename(place / "WHOLE")
    (place / "OUT").mkdir()
    (place / "WHOLE/checkpoint-2").rename(place / "OUT/checkpoint-2")
    again = load_file(run(line, steps=4) / "en_de/adapter.safetensors")
    assert wanted and all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_metrics_compare_texts(script: ModuleType, place: Path):
    tokenizer = AutoTokenizer.from_pretrained(place / "t5-small")
    right = tokenizer(text_target=["in the tower of Paris it is high"])["input_ids"]
    predictions = np.array([[0, *right[0], -100, -100]])
    measured = script.build_metrics(tokenizer)(EvalPrediction(predictions=predictions, label_ids=np.array(right)))
    assert measured == {"bleu": pytest.approx(100), "gen_len": len(right[0])}


@pytest.mark.parametrize("written", ["{}", "__{}__"])
def test_languages_are_tokens_where_the_model_has_them(script: ModuleType, written: str):
    numbers = {written.format("de"): 7}
    tokenizer = SimpleNamespace(src_lang=None, tgt_lang=None, unk_token_id=3)
    tokenizer.convert_tokens_to_ids = lambda token: numbers.get(token, 3)
    model = SimpleNamespace(
        config=SimpleNamespace(model_type="m2m_100", decoder_start_token_id=None),
        generation_config=SimpleNamespace(decoder_start_token_id=None, forced_bos_token_id=None),
    )
    options = {"train_file": "x", "source_lang": "en", "target_lang": "de", "forced_bos_token": "de"}
    script.set_language(model, tokenizer, script.DataTrainingArguments(**options))
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en", "de")
    assert model.config.decoder_start_token_id == model.generation_config.forced_bos_token_id == 7
    with pytest.raises(AdapterError, match="forced_bos_token='fr': the tokenizer has no such token"):
        script.set_language(model, tokenizer, script.DataTrainingArguments(**{**options, "forced_bos_token": "fr"}))


MISTAKES = [
    ("--train_file nowhere.json", "nowhere.json: there is no such file"),
    ("--train_file empty.json", "empty.json: the file is empty"),
    ("--train_file broken.json", "broken.json: it cannot be read as json"),
    ("--target_lang fr", "The train data has no fr; a row must be"),
    ("--train_file gap.json", "row 2, has '' in de; it must be a text"),
    ("--do_predict", "There is no test data, only train, validation"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    (place / "empty.json").write_text("")
    (place / "broken.json").write_text('{"translation": ')
    write_rows(place / "gap.json", [{"translation": {"en": "a", "de": german}} for german in ("b", "")])
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")


def test_languages_must_be_given(script: ModuleType):
    with pytest.raises(AdapterError, match="source_lang=None, target_lang='de': both must be given"):
        script.DataTrainingArguments(train_file="x", target_lang="de")


def test_options_from_a_file(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"model_name_or_path": "x", "train_file": "a.json", "source_lang": "en", "target_lang": "de"}
    (tmp_path / "options.json").write_text(json.dumps({**options, "output_dir": "OUT", "train_adapter": True}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_translation.py", "options.json"])
    _, data_args, training_args, adapter_args = script.parse_arguments()
    assert (data_args.target_lang, training_args.output_dir, adapter_args.train_adapter) == ("de", "OUT", True)
    for content in ("{", json.dumps({**options, "no_such_option": 1}), json.dumps({"output_dir": "OUT"}), None):
        file = tmp_path / "options.json"
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(AdapterError, match=r"options.json: the options cannot be read from it"):
            script.parse_arguments()
