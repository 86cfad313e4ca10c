"""The models that are compared. All share the weights of one base, but for the one that trains all of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import adapters


@dataclass(frozen=True)
class Shape:
    """The shape of an encoder."""

    name: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int = 30_522

    def build(self) -> nn.Module:
        """The encoder with a classification head and random weights."""
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
        )
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


MINILM, BERT_BASE = Shape("MiniLM", 384, 6, 12), Shape("BERT-base", 768, 12, 12)
TWO_LAYERS = Shape("two layers of MiniLM", 384, 2, 12, vocabulary=1000)  # what a method costs, it costs in each layer
TINY = Shape("tiny", 32, 2, 4, vocabulary=100)
METHODS = {"LoRA": "lora[r=8]", "bottleneck": "seq_bn", "prefix": "prefix_tuning"}


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def inactive(base: nn.Module) -> nn.Module:
    """One adapter of each method is there, none is active."""
    model = sharing(base)
    adapters.init(model)
    for name, config in METHODS.items():
        model.add_adapter(name, config=config)
    return model


def adapted(base: nn.Module, method: str) -> nn.Module:
    """An active adapter, ready to train."""
    model = sharing(base)
    adapters.init(model)
    model.add_adapter("task", config=METHODS[method])
    model.train_adapter("task")
    return model


def with_peft(base: nn.Module, method: str) -> nn.Module:
    """The same shapes in PEFT, which has no bottleneck adapters."""
    import peft  # here, since the interpreter of 1.3.0 has none

    configs = {
        "LoRA": peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"]),
        "prefix": peft.PrefixTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512
        ),
    }
    return peft.get_peft_model(sharing(base), configs[method])


def inputs(shape: Shape, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens without padding, and labels."""
    torch.manual_seed(1)
    ids = torch.randint(shape.vocabulary, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}


def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A forward pass without gradients."""
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(**batch)

    return run


def training_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Forward, backward and a step of AdamW on what is trainable."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
