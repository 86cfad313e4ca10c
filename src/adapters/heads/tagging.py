"""Heads with predictions for each token: tagging and extractive question answering."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    Seq2SeqModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from ..errors import ConfigError
from .base import IGNORED, PredictionHead, label_ids


class TaggingHead(PredictionHead):
    """logits = W h_t + b for each token t, ``(b, s, num_labels)``.

    Loss: cross entropy over the tokens that the attention mask keeps and whose label is not -100.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        id2label: Mapping[int, str] | None = None,
        dropout_prob: float | None = None,
    ) -> None:
        super().__init__(head_name)
        self.config = token_config("tagging", num_labels, layers, activation_function, id2label, dropout_prob)
        self.build(model)

    def forward(  # type: ignore[override]
        self,
        outputs: ModelOutput,
        cls_output: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = False,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits and loss from the base model's output."""
        logits = self.run(outputs[0])
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask != 1, IGNORED)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return self.result(TokenClassifierOutput, outputs, return_dict, loss=loss, logits=logits)


class QuestionAnsweringHead(PredictionHead):
    """start_t, end_t = W h_t + b for each token t, ``(b, s)`` each: the span that answers a question.

    Loss: mean of the two cross entropies over the positions; a position outside the sequence is ignored.
    """

    label_names = ("start_positions", "end_positions")

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        id2label: Mapping[int, str] | None = None,
        dropout_prob: float | None = None,
    ) -> None:
        super().__init__(head_name)
        if num_labels != 2:
            raise ConfigError(f"head {head_name!r}: num_labels is {num_labels}; a span has 2, its start and its end.")
        self.config = token_config(
            "question_answering", num_labels, layers, activation_function, id2label, dropout_prob
        )
        self.build(model)

    def forward(  # type: ignore[override]
        self,
        outputs: ModelOutput,
        cls_output: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = False,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Start logits, end logits and loss from the base model's output."""
        start, end = self.run(outputs[0]).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [span_loss(start, start_positions), span_loss(end, end_positions)]
            loss = sum(losses) / 2
        encoder_decoder = isinstance(outputs, Seq2SeqModelOutput)
        kind = Seq2SeqQuestionAnsweringModelOutput if encoder_decoder else QuestionAnsweringModelOutput
        return self.result(kind, outputs, return_dict, loss=loss, start_logits=start, end_logits=end)


def token_config(
    head_type: str,
    num_labels: int,
    layers: int,
    activation_function: str | None,
    id2label: Mapping[int, str] | None,
    dropout_prob: float | None,
) -> dict[str, Any]:
    """The config of a head on token level."""
    return {
        "head_type": head_type,
        "num_labels": num_labels,
        "layers": layers,
        "activation_function": activation_function,
        "label2id": label_ids(id2label),
        "dropout_prob": dropout_prob,
    }


def span_loss(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one end of the span, ``(b, s)`` against ``(b,)`` or ``(b, 1)``."""
    outside = logits.shape[1]
    return nn.functional.cross_entropy(logits, positions.flatten().clamp(0, outside), ignore_index=outside)
