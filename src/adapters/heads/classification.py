"""Heads that read one vector per sequence: classification, multi-label, regression, multiple choice, images."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    ImageClassifierOutput,
    MultipleChoiceModelOutput,
    Seq2SeqModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from .base import PredictionHead, label_ids


class ClassificationHead(PredictionHead):
    """logits = W h + b with h the sentence vector, or W act(V h + c) + b with two layers; logits ``(b, num_labels)``.

    Loss: cross entropy; with ``num_labels=1`` the mean squared error (regression).
    """

    head_type: ClassVar[str] = "classification"

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        bias: bool = True,
        dropout_prob: float | None = None,
    ) -> None:
        super().__init__(head_name)
        self.config = {
            "head_type": self.head_type,
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
            "label2id": label_ids(id2label),
            "use_pooler": use_pooler,
            "bias": bias,
            "dropout_prob": dropout_prob,
        }
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
        logits = self.run(self.sentence(cls_output, **inputs))
        loss = None if labels is None else self.loss(logits, labels)
        encoder_decoder = isinstance(outputs, Seq2SeqModelOutput)
        kind = Seq2SeqSequenceClassifierOutput if encoder_decoder else SequenceClassifierOutput
        return self.result(kind, outputs, return_dict, loss=loss, logits=logits)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss over the batch."""
        return single_label_loss(logits, labels)


class MultiLabelClassificationHead(ClassificationHead):
    """A classification head whose labels do not exclude each other; labels are ``(b, num_labels)`` of 0 and 1.

    Loss: binary cross entropy of each label.
    """

    head_type = "multilabel_classification"

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss over batch and labels."""
        return multi_label_loss(logits, labels)


class MultipleChoiceHead(PredictionHead):
    """One score per choice, ``(b, num_choices)``, from inputs of shape ``(b, num_choices, s)``.

    Loss: cross entropy over the choices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        num_choices: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        dropout_prob: float | None = None,
    ) -> None:
        super().__init__(head_name)
        self.config = {
            "head_type": "multiple_choice",
            "num_choices": num_choices,
            "layers": layers,
            "activation_function": activation_function,
            "label2id": label_ids(id2label),
            "use_pooler": use_pooler,
            "dropout_prob": dropout_prob,
        }
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
        """Scores and loss from the base model's output on the flattened choices."""
        logits = self.run(self.sentence(cls_output, **inputs)).view(-1, self.config["num_choices"])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return self.result(MultipleChoiceModelOutput, outputs, return_dict, loss=loss, logits=logits)


class ImageClassificationHead(PredictionHead):
    """logits = W h + b with h the image vector, or W act(V h + c) + b with two layers; logits ``(b, num_labels)``.

    Loss: cross entropy; mean squared error with ``num_labels=1``; binary cross entropy with ``multilabel``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        multilabel: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        bias: bool = True,
        dropout_prob: float | None = None,
    ) -> None:
        super().__init__(head_name)
        self.config = {
            "head_type": "image_classification",
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
            "multilabel": multilabel,
            "label2id": label_ids(id2label),
            "use_pooler": use_pooler,
            "bias": bias,
            "dropout_prob": dropout_prob,
        }
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
        logits = self.run(self.sentence(cls_output, **inputs))
        loss = None
        if labels is not None:
            loss = (multi_label_loss if self.config["multilabel"] else single_label_loss)(logits, labels)
        return self.result(ImageClassifierOutput, outputs, return_dict, loss=loss, logits=logits)


def single_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy, or the mean squared error of a single output."""
    if logits.shape[-1] == 1:
        return nn.functional.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
    return nn.functional.cross_entropy(logits, labels.flatten())


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of each label."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
