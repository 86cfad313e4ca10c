"""run_sft.py and run_dpo.py as a user starts them: the commands of the page, answers, a resumed run, mistakes."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from example_runs import DATA, load_script, results
from pages import command_of, make_data, run, tiny_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import adapters
from adapters.errors import AdapterError

pytest.importorskip("trl", reason="TRL is not installed")

FOLDER = "instruction-tuning"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
SHORT = "--max_train_samples 8 --max_eval_samples 4 --max_steps 2"
# TRL 1.16 sets gradient_checkpointing, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def turns(question: str, **answers: str) -> dict[str, Any]:
    rows: dict[str, Any] = {"prompt": [{"role": "user", "content": question}]}
    return rows | {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small model under the name of the page's, and the page's data."""
    monkeypatch.chdir(tmp_path)
    if DATA.is_dir():
        make_data(FOLDER, "balacopa")
    else:
        row = turns("It rained .", completion="I got wet .", chosen="I got wet .", rejected="I ran .")
        for name in ("train", "dev"):
            Path(f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 12, "utf-8")
    words = sorted({word for line in Path("dev.jsonl").read_text("utf-8").split('"') for word in line.split()})
    special = ["<pad>", "<eos>", "<unk>"]
    tokenizer = tiny_tokenizer([word for word in words if word.isalpha()], special, chat_template=TEMPLATE)
    tokenizer.save_pretrained("smollm2")
    set_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ends)).save_pretrained("smollm2")
    return tmp_path


@pytest.fixture(scope="module")
def sft() -> ModuleType:
    return load_script(f"{FOLDER}/run_sft.py")


@pytest.fixture(scope="module")
def dpo() -> ModuleType:
    return load_script(f"{FOLDER}/run_dpo.py")


def test_answers(sft: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    out = run(sft, command_of(FOLDER, "out/chat"), SHORT, monkeypatch)
    assert results(out)["eval_samples"] == 4 and results(out)["perplexity"] > 1
    lines = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 2 and all(set(line) == {"prompt", "answer"} for line in lines)
    model = LlamaForCausalLM.from_pretrained("smollm2")
    adapters.init(model)
    assert model.load_adapter(str(out / "chat")) == "chat"
    assert not list(out.glob("model*.safetensors"))


def test_four_bits(sft: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    out = run(sft, command_of(FOLDER, "out/chat4"), SHORT, monkeypatch)
    assert {tensor.dtype for tensor in load_file(out / "chat/adapter.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("more", ["", "--load_in_4bit"])
def test_preferences(dpo: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, more: str):
    if more:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    more = f"{SHORT} --test_file dev.jsonl --do_predict --max_predict_samples 3 {more}"
    out = run(dpo, command_of(FOLDER, "out/preferred"), more, monkeypatch)
    history = json.loads((out / "trainer_state.json").read_text("utf-8"))["log_history"]
    assert history[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # at first the model is its own reference
    assert 0 <= results(out)["eval_rewards/accuracies"] <= 1 and results(out, "predict")["predict_samples"] == 3
    assert (out / "preference/adapter.safetensors").is_file()


def test_a_resumed_run_ends_as_an_unbroken_one(sft: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch):
    command = [word for word in command_of(FOLDER, "out/chat") if word != "--overwrite_output_dir"]
    more = "--max_train_samples 8 --max_eval_samples 2 --max_steps 4 --save_strategy steps --save_steps 2"
    out = run(sft, command, more, monkeypatch)
    wanted = load_file(out / "chat/adapter.safetensors")
    out.rename("WHOLE")
    out.mkdir()
    Path("WHOLE/checkpoint-2").rename(out / "checkpoint-2")
    again = load_file(run(sft, command, more, monkeypatch) / "chat/adapter.safetensors")
    assert wanted and all(torch.equal(again[name], value) for name, value in wanted.items())


MISTAKES = [
    ("nowhere.jsonl", "", "nowhere.jsonl: there is no such file"),
    ("column.jsonl", "", r"has the columns question; it must have messages, or prompt and completion, or text"),
    ("role.jsonl", "", r"row 1, column messages, the message .*; each must have a role and a content"),
    ("number.jsonl", "", r"row 1, column text, 3; it must be a text, or a list of messages"),
    ("train.jsonl", "--load_in_4bit --train_adapter False", "A quantised model cannot be trained as a whole"),
    ("train.jsonl", "--load_in_4bit --load_in_8bit", "a model is kept in one of them"),
    ("train.jsonl", "--adapter_config seq_bn_inv", "acts at the map onto words, which TRL's loss passes by"),
]


@pytest.mark.parametrize(("file", "more", "message"), MISTAKES, ids=[message[:30] for *_, message in MISTAKES])
def test_mistakes_are_told(
    sft: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, file: str, more: str, message: str
):
    Path("column.jsonl").write_text('{"question": "a"}\n', "utf-8")
    Path("role.jsonl").write_text('{"messages": [{"content": "a"}]}\n', "utf-8")
    Path("number.jsonl").write_text('{"text": 3}\n', "utf-8")
    with pytest.raises(AdapterError, match=message):
        run(sft, command_of(FOLDER, "out/chat"), f"{SHORT} --train_file {file} {more}", monkeypatch)
