"""TRL's trainers for adapters: supervised fine-tuning, and DPO whose reference is the model without its adapters.

`import adapters.training` leaves this module out, as TRL is no requirement: `pip install trl`.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ..context import AdapterSetup
from ..errors import AdapterError
from ..model import ModelAdaptersMixin
from .legacy_arguments import AdapterTrainingArguments
from .trainer import AdapterTrainer


@dataclass
class AdapterSFTConfig(SFTConfig, AdapterTrainingArguments):  # type: ignore[misc]
    """`SFTConfig` with the options of transformers 4 that v5 dropped, and LoRA+."""


@dataclass
class AdapterDPOConfig(DPOConfig, AdapterTrainingArguments):  # type: ignore[misc]
    """`DPOConfig` with the options of transformers 4 that v5 dropped, and LoRA+."""


class AdapterSFTTrainer(AdapterTrainer, SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` that trains, saves and resumes adapters of a frozen model, which may be quantised.

    Takes the arguments of `AdapterTrainer` and of `SFTTrainer`. Adapters keep their precision.

    Raises:
        AdapterError: As `AdapterTrainer`; or the model has no map onto words of its own, or an active adapter acts on
            its input or output, which TRL's loss passes by.

    Example:
        >>> model.add_adapter("chat", "lora")
        >>> model.train_adapter("chat")
        >>> AdapterSFTTrainer(model, AdapterSFTConfig("out"), train_dataset=data, processing_class=tokenizer).train()
    """

    def _admit(self, model: PreTrainedModel | nn.Module) -> PreTrainedModel:
        return _with_plain_output(super()._admit(model), type(self).__name__)


class AdapterDPOTrainer(AdapterTrainer, DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` that trains, saves and resumes adapters; its reference is the model without them.

    So no second model is held in memory, unless `ref_model` is one. Takes the arguments of `AdapterTrainer` and of
    `DPOTrainer`.

    Raises:
        AdapterError: As `AdapterSFTTrainer`; or `sync_ref_model` is set without a `ref_model`.

    Example:
        >>> model.add_adapter("choice", "lora")
        >>> model.train_adapter("choice")
        >>> AdapterDPOTrainer(model, AdapterDPOConfig("out"), train_dataset=data, processing_class=tokenizer).train()
    """

    def __init__(
        self, model: PreTrainedModel, args: DPOConfig | None = None, *rest: Any, ref_model: Any = None, **kwargs: Any
    ) -> None:
        if ref_model is None and args is not None and args.sync_ref_model:
            raise AdapterError(
                "AdapterDPOTrainer(sync_ref_model=True): the reference is the model without adapters, which never "
                "changes; it must be a model of its own. Give one as ref_model, or leave sync_ref_model out."
            )
        reference = WithoutAdapters(model) if ref_model is None else ref_model
        super().__init__(model, args, *rest, ref_model=reference, **kwargs)

    def _admit(self, model: PreTrainedModel | nn.Module) -> PreTrainedModel:
        return _with_plain_output(super()._admit(model), type(self).__name__)


class WithoutAdapters(nn.Module):
    """A language model while its adapters are off: the same weights, none of them its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple it is no part of this module: nobody moves it or switches its mode

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model[0].config

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the base model."""
        with AdapterSetup(None):
            return self._model[0].base_model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model."""
        with AdapterSetup(None):
            return self._model[0](*args, **kwargs)

    def get_output_embeddings(self) -> Any:
        """The map onto words."""
        return self._model[0].get_output_embeddings()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's: TRL tells by it whether log-probabilities that it kept are of the same reference."""
        state: dict[str, Any] = self._model[0].state_dict(*args, **kwargs)
        return state


def _with_plain_output(model: PreTrainedModel, asked: str) -> PreTrainedModel:
    """The model, whose map onto words TRL multiplies with by itself, in pieces: no adapter may act on it."""
    output = model.get_output_embeddings()
    if not isinstance(getattr(output, "weight", None), nn.Parameter):
        raise AdapterError(
            f"{asked}(model={type(model).__name__}): the model has no map onto words of its own; it must be a causal "
            "language model. Load it with AutoModelForCausalLM and call adapters.init(model)."
        )
    adapted = cast(ModelAdaptersMixin, model)
    active = set(adapted.active_adapters.flatten()) if adapted.active_adapters else set()
    for site in adapted.adapter_sites.sites:
        if (site.host is output or site.kind == "embedding") and (names := sorted(active & set(site.adapters))):
            raise AdapterError(
                f"{asked}(model={type(model).__name__}): {names[0]!r} acts at the map onto words, which TRL's loss "
                "passes by; it must act elsewhere only. Use a configuration without an invertible adapter and without "
                "lm_head among its modules, or AdapterTrainer."
            )
    return model
