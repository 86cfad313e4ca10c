"""What every prediction head is: a sequence of layers with a name and a JSON-able config."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils.generic import ModelOutput

from ..checkpoints.heads import numbered
from ..errors import AdapterError, ConfigError, check_type, suggestion

# The dropout before a classifier under the names that architectures give it, the most specific first.
DROPOUT_NAMES = (
    "classifier_dropout",
    "classifier_dropout_prob",
    "seq_classif_dropout",
    "hidden_dropout_prob",
    "dropout",
    "resid_pdrop",
    "dropout_rate",
)
IGNORED = -100


class UnknownHeadTypeError(AdapterError, AttributeError):
    """A head config names a type that is neither built in nor registered."""


class PredictionHead(nn.Sequential):
    """A named stack of layers on top of a model; the parameters are ``heads.<name>.<index>.weight`` and ``.bias``.

    A subclass takes ``(model, head_name, **settings)``, stores just these settings in ``self.config``, calls
    ``self.build(model)`` and defines ``forward(outputs, cls_output, attention_mask, return_dict, **inputs)``.
    ``super().forward(hidden)`` runs the layers.

    Attributes:
        name: The name of the head in its model.
        config: The settings as they stand in ``config.prediction_heads`` and in ``head_config.json``.

    Example:
        >>> class MeanHead(PredictionHead):
        ...     def __init__(self, model, head_name, num_labels=2):
        ...         super().__init__(head_name)
        ...         self.config = {"num_labels": num_labels}
        ...         self.build(model)
        ...     def forward(self, outputs, cls_output=None, attention_mask=None, return_dict=False, **inputs):
        ...         return (super().forward(outputs[0].mean(dim=1)),)
    """

    label_names: ClassVar[tuple[str, ...]] = ("labels",)

    name: str
    config: dict[str, Any]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.config = {}

    def build(self, model: PreTrainedModel) -> None:
        """Makes the layers that ``self.config`` describes: dropout, linear map and activation per layer.

        Raises:
            ConfigError: The number of layers or labels is not a positive integer, or the activation is unknown.
        """
        width, dropout = hidden_size(model.config), self.dropout_probability(model.config)
        depth, labels = self._positive("layers", 1), self._positive("num_labels", 1)
        for _ in range(depth - 1):
            self.extend([nn.Dropout(dropout), nn.Linear(width, width)])
            if self.config.get("activation_function"):
                self.append(activation(self.config["activation_function"]))
        self.extend([nn.Dropout(dropout), nn.Linear(width, labels, bias=self.config.get("bias", True))])
        self.settle(model)

    def settle(self, model: PreTrainedModel) -> None:
        """Gives the layers the model's device, precision, mode and initialisation."""
        self.to(dtype=model.dtype).train(model.training)
        if not any(parameter.is_meta for parameter in self.parameters()):  # from_pretrained fills those itself
            self.to(device=model.device).apply(model._init_weights)

    def dropout_probability(self, config: PreTrainedConfig) -> float:
        """The head's own ``dropout_prob``, else the model's dropout before a classifier, else 0."""
        candidates = [self.config.get("dropout_prob"), *(vars(config).get(name) for name in DROPOUT_NAMES)]
        return next((float(value) for value in candidates if value is not None), 0.0)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layers, one after the other."""
        for layer in self:
            hidden = layer(hidden)
        return hidden

    def sentence(
        self, cls_output: torch.Tensor | None, pooled_output: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """The vector of the whole sequence, ``(b, d)``: the pooler's with ``use_pooler``, else the architecture's.

        Raises:
            AdapterError: The head asks for a pooler and the model has none.
        """
        if not self.config.get("use_pooler"):
            if cls_output is None:
                raise AdapterError(
                    f"head {self.name!r}: no sentence vector was given; pass cls_output of shape (b, d)."
                )
            return cls_output
        if pooled_output is None:
            raise AdapterError(
                f"head {self.name!r}: use_pooler=True, but this model returns no pooler_output. "
                "Add the head with use_pooler=False."
            )
        return pooled_output

    def get_output_embeddings(self) -> nn.Linear | None:
        """The map onto the vocabulary, or None."""
        return None

    def get_label_names(self) -> list[str]:
        """The forward arguments that carry labels."""
        return list(self.label_names)

    def result(
        self, kind: type[ModelOutput], outputs: ModelOutput, return_dict: bool, **predictions: Any
    ) -> ModelOutput | tuple[Any, ...]:
        """The output of a head: its predictions and what the base model's output has in common with ``kind``."""
        names = [name for name in field_names(kind) if name in outputs and name not in predictions]
        result = kind(**predictions, **{name: outputs[name] for name in names})
        return result if return_dict else result.to_tuple()

    def _positive(self, key: str, default: int) -> int:
        value = self.config.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"head {self.name!r}: {key} is {value!r}; it must be an integer of at least 1.")
        return value


def field_names(kind: type[ModelOutput]) -> Iterable[str]:
    """The fields of an output class in order; unlike dataclasses.fields, torch.compile can trace it."""
    names: Iterable[str] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return names


def hidden_size(config: PreTrainedConfig) -> int:
    """The width of the hidden states that heads read.

    Raises:
        ConfigError: The architecture has no single width.
    """
    text = config.get_text_config()
    try:
        return int(text.hidden_size)
    except AttributeError:
        raise ConfigError(
            f"prediction head: the config of {config.model_type!r} has no hidden_size; a head needs a model "
            "whose hidden states have one width. Register a custom head that makes its own layers."
        ) from None


def activation(name: str) -> nn.Module:
    """The activation of that name, in any case.

    Raises:
        ConfigError: transformers knows no such activation.
    """
    known = {"leakyrelu": "leaky_relu"} | {key: key for key in ACT2FN}
    check_type("activation_function", name, str, "the name of one, or None")
    if name.lower() not in known:
        raise ConfigError(f"activation_function={name!r}: unknown activation; {suggestion(name.lower(), known)}")
    module: nn.Module = ACT2FN[known[name.lower()]]
    return module


def label_ids(id2label: Mapping[Any, str] | None) -> dict[str, int] | None:
    """The inverse of ``id2label``, the only direction that a head stores."""
    return None if id2label is None else numbered("id2label", id2label)
