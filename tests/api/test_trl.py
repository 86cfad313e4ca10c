"""TRL's trainers with adapters: what is trained, saved and resumed; DPO's reference; what they cannot do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import adapters
from adapters.errors import AdapterError

pytest.importorskip("trl", reason="TRL is not installed")
from adapters.training.trl import (
    AdapterDPOConfig,
    AdapterDPOTrainer,
    AdapterSFTConfig,
    AdapterSFTTrainer,
    WithoutAdapters,
)

# TRL 1.16 sets gradient_checkpointing, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e", "f"]
ANSWERS = Dataset.from_list([{"prompt": "a b", "completion": " c d"}, {"prompt": "b a", "completion": " d c"}] * 8)
CHOICES = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}] * 16)
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def adapted(config: Any) -> LlamaForCausalLM:
    set_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, **size))
    adapters.init(model)
    model.add_adapter("chat", config)
    model.train_adapter("chat")
    return model


def sft(model: Any, folder: Path, tokenizer: Any, **options: Any) -> AdapterSFTTrainer:
    arguments = AdapterSFTConfig(str(folder), **OPTIONS | options)
    data = {"train_dataset": ANSWERS, "eval_dataset": ANSWERS}
    return AdapterSFTTrainer(model, arguments, processing_class=tokenizer, **data)


def dpo(model: Any, folder: Path, tokenizer: Any, **options: Any) -> AdapterDPOTrainer:
    arguments = AdapterDPOConfig(str(folder), **OPTIONS | options)
    data = {"train_dataset": CHOICES, "eval_dataset": CHOICES}
    return AdapterDPOTrainer(model, arguments, processing_class=tokenizer, **data)


@pytest.mark.parametrize("config", ["lora", "seq_bn", "loreft", "prefix_tuning"])
def test_supervised_fine_tuning(config: str, tmp_path: Path, tokenizer: Any):
    model = adapted(config)
    base = {name: value.clone() for name, value in model.state_dict().items() if ".chat." not in name}
    trainer = sft(model, tmp_path, tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())
    weights = {path.name for path in (tmp_path / "checkpoint-4").rglob("*.safetensors")}
    assert weights and not any(name == "model.safetensors" for name in weights)


def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path: Path, tokenizer: Any):
    sft(adapted("lora"), tmp_path, tokenizer).train()
    whole = load_file(next((tmp_path / "checkpoint-4/chat").glob("adapter.safetensors")))
    trainer = sft(adapted("lora"), tmp_path, tokenizer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.save_model()
    again = load_file(tmp_path / "chat/adapter.safetensors")
    assert whole and all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("config", ["lora", "seq_bn"])
def test_the_reference_is_the_model_without_adapters(config: str, tmp_path: Path, tokenizer: Any):
    model = adapted(config)
    ids = torch.tensor([[3, 4, 5]])
    model.set_active_adapters(None)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    model.train_adapter("chat")
    trainer = dpo(model, tmp_path, tokenizer)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # both answers are as likely as in the reference
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_rewards/accuracies"] == 1
    assert not list(trainer.ref_model.parameters())
    with torch.no_grad():
        assert torch.equal(WithoutAdapters(model)(input_ids=ids).logits, wanted)
        assert not torch.equal(model(input_ids=ids).logits, wanted)


def test_log_probabilities_of_the_reference_may_be_worked_out_before(tmp_path: Path, tokenizer: Any):
    losses = []
    for folder, before in (("a", False), ("b", True)):
        trainer = dpo(
            adapted("lora"), tmp_path / folder, tokenizer, precompute_ref_log_probs=before, save_strategy="no"
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_adapters_on_four_bits_keep_their_precision(tmp_path: Path, tokenizer: Any):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **size)).save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation, device_map="cpu")
    adapters.prepare_quantized_training(model, gradient_checkpointing=False)
    model.add_adapter("chat", "lora")
    model.train_adapter("chat")
    trainer = sft(model, tmp_path / "out", tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".chat." in name} == {torch.float32}
    assert model.is_loaded_in_4bit and model.is_quantized


def test_dropped_options_keep_their_meaning(tmp_path: Path):
    arguments = AdapterSFTConfig(str(tmp_path), warmup_ratio=0.1, loraplus_lr_ratio=16, use_cpu=True, bf16=False)
    assert arguments.warmup_steps == 0.1 and arguments.loraplus_lr_ratio == 16
    assert arguments.learning_rate == 2e-5  # SFTConfig's own defaults stay


def test_what_cannot_be_trained(tmp_path: Path, tokenizer: Any):
    for config in ("seq_bn_inv", "lora[target_modules=['lm_head','q_proj']]"):
        with pytest.raises(AdapterError, match="'chat' acts at the map onto words, which TRL's loss passes by"):
            sft(adapted(config), tmp_path, tokenizer)
    with pytest.raises(AdapterError, match=r"sync_ref_model=True.*never changes"):
        dpo(adapted("lora"), tmp_path, tokenizer, sync_ref_model=True)
    model = adapted("lora")
    model.set_active_adapters(None)
    with pytest.raises(AdapterError, match="Expected a model with an active adapter setup"):
        sft(model, tmp_path, tokenizer)
    with pytest.raises(AdapterError, match="has no map onto words of its own"):
        base = adapters.AutoAdapterModel.from_config(model.config)
        base.add_adapter("chat")
        base.train_adapter("chat")
        sft(base, tmp_path, tokenizer)
