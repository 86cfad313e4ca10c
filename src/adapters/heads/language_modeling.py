"""Heads that map onto the vocabulary: masked, causal and sequence-to-sequence language modeling."""

from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    CausalLMOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)
from transformers.utils.generic import ModelOutput

from ..streams import Inverse
from .base import IGNORED, PredictionHead, activation, hidden_size


class CausalLMHead(PredictionHead):
    """logits = W norm(act(V h_t + c)) + b, ``(b, s, vocab_size)``: the next token after each token.

    With one layer logits = W h_t. W is tied to the input embeddings if ``config.tie_word_embeddings``.
    Loss: cross entropy of the logits at t against the label at t + 1 (``shift_labels``); labels of -100 are ignored.
    """

    head_type: ClassVar[str] = "causal_lm"
    generative: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        vocab_size: int | None = None,
        embedding_size: int | None = None,
        layers: int = 1,
        activation_function: str | None = None,
        layer_norm: bool = False,
        bias: bool = False,
        shift_labels: bool = True,
        dropout_prob: float | None = None,
    ) -> None:
        super().__init__(head_name)
        self.config = {
            "head_type": self.head_type,
            "vocab_size": vocab_size or model.config.get_text_config().vocab_size,
            "embedding_size": embedding_size or vars(model.config).get("embedding_size") or hidden_size(model.config),
            "layers": layers,
            "activation_function": activation_function,
            "layer_norm": layer_norm,
            "bias": bias,
            "shift_labels": shift_labels,
            "label2id": None,
            "dropout_prob": dropout_prob,
        }
        self.build(model)

    def build(self, model: PreTrainedModel) -> None:
        """Makes linear map, activation and norm per layer, then the map onto the vocabulary."""
        settings, width = self.config, hidden_size(model.config)
        inner = settings.get("embedding_size", width)
        for _ in range(self._positive("layers", 1) - 1):
            self.append(nn.Linear(width, inner))
            width = inner
            if settings["activation_function"]:
                self.append(activation(settings["activation_function"]))
            if settings["layer_norm"]:
                self.append(nn.LayerNorm(inner, eps=vars(model.config).get("layer_norm_eps") or 1e-12))
        self.append(nn.Linear(width, self._positive("vocab_size", 1), bias=settings["bias"]))
        self.settle(model)

    def get_output_embeddings(self) -> nn.Linear:
        """The map onto the vocabulary."""
        return cast(nn.Linear, self[-1])

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the map onto the vocabulary, and with it the vocabulary's size."""
        self[-1] = new_embeddings
        self.config["vocab_size"] = new_embeddings.out_features

    def forward(  # type: ignore[override]
        self,
        outputs: ModelOutput,
        cls_output: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = False,
        labels: torch.Tensor | None = None,
        invertible_adapter: Inverse | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits and loss from the base model's output; see ``loss`` for ``num_items_in_batch``."""
        hidden = outputs[0]
        for layer in list(self)[:-1]:
            hidden = layer(hidden)
        if invertible_adapter is not None:
            hidden = invertible_adapter(hidden, rev=True)
        logits = self[-1](hidden)
        loss = None if labels is None else self.loss(logits, labels, num_items_in_batch)
        return self.result(self.output_kind(outputs), outputs, return_dict, loss=loss, logits=logits)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Mean cross entropy over the labelled tokens, in single precision; or their sum by the number of all items.

        With gradient accumulation the Trainer counts the labelled tokens of all steps and gives this number.
        """
        if self.config["shift_labels"]:
            logits, labels = logits[:, :-1], labels[:, 1:]
        scores, targets = logits.flatten(0, 1).float(), labels.flatten()
        if num_items_in_batch is None:
            return nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED)
        total = nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
        return total / torch.as_tensor(num_items_in_batch, device=total.device)

    def output_kind(self, outputs: ModelOutput) -> type[ModelOutput]:
        """The output class: with a cache if the base model returned one."""
        return CausalLMOutputWithPast if "past_key_values" in outputs else CausalLMOutput


class BertStyleMaskedLMHead(CausalLMHead):
    """logits = W norm(act(V h_t + c)) + b, ``(b, s, vocab_size)``: the token that was masked.

    Loss: cross entropy over all tokens whose label is not -100.
    """

    head_type = "masked_lm"
    generative = False

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        vocab_size: int | None = None,
        embedding_size: int | None = None,
        layers: int = 2,
        activation_function: str | None = "gelu",
        layer_norm: bool = True,
        bias: bool = True,
        shift_labels: bool = False,
    ) -> None:
        super().__init__(
            model,
            head_name,
            vocab_size=vocab_size,
            embedding_size=embedding_size,
            layers=layers,
            activation_function=activation_function,
            layer_norm=layer_norm,
            bias=bias,
            shift_labels=shift_labels,
        )
        del self.config["dropout_prob"]

    def output_kind(self, outputs: ModelOutput) -> type[ModelOutput]:
        """The output class."""
        return MaskedLMOutput


class Seq2SeqLMHead(CausalLMHead):
    """logits = W h_t, ``(b, s, vocab_size)``, on the decoder's hidden states.

    Loss: cross entropy against the labels at the same position; the decoder reads the labels shifted right.
    """

    head_type = "seq2seq_lm"

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        vocab_size: int | None = None,
        layers: int = 1,
        activation_function: str | None = None,
        layer_norm: bool = False,
        bias: bool = False,
        shift_labels: bool = False,
    ) -> None:
        super().__init__(
            model,
            head_name,
            vocab_size=vocab_size,
            embedding_size=hidden_size(model.config),
            layers=layers,
            activation_function=activation_function,
            layer_norm=layer_norm,
            bias=bias,
            shift_labels=shift_labels,
        )
        del self.config["embedding_size"], self.config["dropout_prob"]

    def output_kind(self, outputs: ModelOutput) -> type[ModelOutput]:
        """The output class."""
        return Seq2SeqLMOutput
