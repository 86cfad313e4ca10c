"""run_clm.py as a user starts it: text files, packed into blocks, with adapters, streams and a model from scratch."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from example_runs import Run, load_script, results, runner
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed

import adapters
from adapters.errors import AdapterError

SENTENCES = ["the striker scored in the last minute", "shares in the bank fell", "the vote would be held in may"]
# The command of README.md, but for the steps that `runner` limits.
COMMAND = (
    "--model_name_or_path gpt2 --train_file train.txt --validation_file validation.txt --per_device_train_batch_size 8 "
    "--per_device_eval_batch_size 8 --do_train --do_eval --train_adapter --adapter_config seq_bn --overwrite_output_dir"
)
SHORT = "--model_name_or_path gpt2 --do_train --do_eval --train_adapter --block_size 16"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, the files train.txt and validation.txt, and no network."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=300)
    (tmp_path / "gpt2").mkdir()
    bpe.save_model(str(tmp_path / "gpt2"))
    vocabulary = json.loads((tmp_path / "gpt2/vocab.json").read_text())
    merges = [tuple(line.split()) for line in (tmp_path / "gpt2/merges.txt").read_text().splitlines()[1:]]
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=32)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    set_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for name, times in {"train.txt": 40, "validation.txt": 10}.items():
        (tmp_path / name).write_text("\n".join(SENTENCES * times) + "\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("language-modeling/run_clm.py")


@pytest.fixture
def run(script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(script, place, monkeypatch, "")


def test_the_command_of_the_page_trains_an_adapter_that_generates(run: Run, place: Path):
    out = run(COMMAND)
    assert {"eval_accuracy", "eval_loss", "perplexity"} <= results(out).keys()
    model = AutoModelForCausalLM.from_pretrained(place / "gpt2")
    adapters.init(model)
    model.load_adapter(str(out / "clm"), set_active=True)
    prompt = AutoTokenizer.from_pretrained(place / "gpt2")("the", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == 5


@pytest.mark.parametrize(
    "options", ["", "--no_keep_linebreaks", "--streaming --max_eval_samples 4", "--max_train_samples 3"]
)
def test_texts_are_packed_into_blocks(run: Run, place: Path, options: str):
    out = run(f"{SHORT} --train_file train.txt --validation_file validation.txt {options}")
    assert results(out)["eval_loss"] > 0
    if "streaming" not in options:
        tokenizer = AutoTokenizer.from_pretrained(place / "gpt2")
        lines = (place / "validation.txt").read_text().splitlines(keepends="no_keep" not in options)
        assert results(out)["eval_samples"] == sum(len(tokenizer(line).input_ids) for line in lines) // 16
    if "train_samples" in options:
        assert results(out, "train")["train_samples"] == 3


def test_accuracy_is_that_of_the_next_token(script: ModuleType):
    labels = script.np.array([[1, 2, 3, -100]])
    evaluated = script.EvalPrediction(predictions=script.np.array([[2, 9, 9, 9]]), label_ids=labels)
    assert script.compute_metrics(evaluated) == {"accuracy": 0.5}


def test_a_model_from_scratch(run: Run):
    out = run(
        "--model_type gpt2 --tokenizer_name gpt2 --train_file train.txt --do_train --block_size 16 --train_adapter "
        '--config_overrides="n_embd=32,n_head=2,n_layer=1,n_positions=102"'.replace('"', "")
    )
    assert (out / "clm/adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train_file train.txt --block_size 31 --validation_file short.txt", "has no example of 31 tokens"),
        ("--train_file nowhere.txt", r"nowhere\.txt: there is no such file"),
        ("--train_file train.txt --streaming", "streamed data cannot be split"),
    ],
)
def test_mistakes_are_told(run: Run, place: Path, line: str, message: str):
    (place / "short.txt").write_text("the")
    with pytest.raises(AdapterError, match=message):
        run(f"{SHORT} {line}")
