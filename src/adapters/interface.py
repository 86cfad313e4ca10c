"""``AdapterModelInterface``: what a user says about where things are in a model, in place of what the rules read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from . import __version__
from .configuration.base import AdapterConfig
from .configuration.union import ConfigUnion
from .errors import AdapterError, listing

INTERFACE_FILE = "adapter_interface.json"
REQUIRED = ("layer_self_attn", "attn_o_proj", "layer_intermediate_proj", "layer_output_proj")
ATTENTIONS = {"layer_self_attn": "self-attention layer", "layer_cross_attn": "cross-attention layer"}


class AdapterMethod:
    """The names of methods, as ``AdapterModelInterface`` and ``supports_adapter`` take them."""

    bottleneck = "bottleneck"
    prefix_tuning = "prefix_tuning"
    lora = "lora"
    prompt_tuning = "prompt_tuning"
    reft = "reft"
    invertible = "invertible"

    @staticmethod
    def get_from_config(config: AdapterConfig) -> list[str]:
        """The methods that a configuration is made of; of a bottleneck with an invertible part, that part first."""
        if isinstance(config, ConfigUnion):
            return [method for member in config.configs for method in AdapterMethod.get_from_config(member)]
        first = [AdapterMethod.invertible] if config.get("inv_adapter") else []
        return [*first, config.architecture or AdapterMethod.bottleneck]


@dataclass
class AdapterModelInterface:
    """Where things are in a model, as paths with dots, for a model that the rules do not read as its user does.

    ``adapter_methods`` are the methods that the model is to have, such as "lora" and "bottleneck".
    ``model_embeddings`` and ``model_layers`` are paths in the base model (``base_model``: the attribute of the model
    that is it, if transformers does not know), ``layer_…`` in a layer, ``attn_…`` in an attention. An attention has
    either q, k and v or one fused projection, ``attn_qkv_proj``, whose parts are measured. What ``layer_pre_…`` names
    is given the residual stream of its sub-layer, ``layer_ln_1`` and ``layer_ln_2`` normalise the sums with it; they,
    and the output projections as exits, count where no forward pass of the model could be traced.

    Raises:
        AdapterError: the attention has neither or both kinds of projections.

    Example:
        >>> adapters.init(model, interface=AdapterModelInterface(["lora", "bottleneck"], "words", "layers", …))
    """

    adapter_methods: list[str]
    model_embeddings: str
    model_layers: str
    layer_self_attn: str
    layer_cross_attn: str | None
    attn_o_proj: str | None
    layer_intermediate_proj: str
    layer_output_proj: str
    attn_k_proj: str | None = None
    attn_q_proj: str | None = None
    attn_v_proj: str | None = None
    attn_qkv_proj: str | None = None
    layer_pre_self_attn: str | None = None
    layer_pre_cross_attn: str | None = None
    layer_pre_ffn: str | None = None
    layer_ln_1: str | None = None
    layer_ln_2: str | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        separate = [self.attn_q_proj, self.attn_k_proj, self.attn_v_proj]
        fused: list[Any] = [self.attn_qkv_proj]
        if [None in separate, None in fused] not in ([True, False], [False, True]) or (None in fused) != any(separate):
            raise self._wrong(f"q, k, v are {separate}, qkv is {fused[0]!r}; give all of the first three or the last")
        methods: Any = self.adapter_methods
        if isinstance(methods, str) or not all(isinstance(name, str) for name in methods):
            raise self._wrong(f"adapter_methods is {methods!r}; it must be a list of names such as 'lora'")

    @staticmethod
    def _wrong(why: str) -> AdapterError:
        return AdapterError(f"AdapterInterface: {why}. See docs/any-architecture.md.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def of(cls, given: Any) -> Self | None:
        """An interface from one, its fields in a dict, its file, or a folder that has it; None stays None.

        Raises:
            AdapterError: a field is unknown or missing, or there is no such file.
        """
        if given is None or isinstance(given, cls):
            return given
        try:
            if isinstance(given, (str, os.PathLike)):
                file = Path(given, INTERFACE_FILE) if Path(given).is_dir() else Path(given)
                given = json.loads(file.read_text("utf-8"))["interface"]
            if not isinstance(given, Mapping):
                raise TypeError(f"it is of type {type(given).__name__}")
            return cls(**given)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise cls._wrong(
                f"interface={given!r}: {error}; give an AdapterModelInterface, its fields, or a folder with "
                f"{INTERFACE_FILE}"
            ) from error

    def content(self, model_type: str) -> dict[str, Any]:
        """What its file holds."""
        return {"interface": self.to_dict(), "model_type": model_type, "version": f"adapters.{__version__}"}

    def base_of(self, model: Any) -> Any:
        """The base model of a model.

        Raises:
            AdapterError: it has no such part.
        """
        if self.base_model is None:
            return getattr(model, "base_model", model)
        return self._find(model, "base_model", "model")

    def check(self, base_model: nn.Module) -> None:
        """Refuse paths that a model does not have.

        Raises:
            AdapterError: a path leads nowhere, or there is no layer.
        """
        self._find(base_model, "model_embeddings", "base_model")
        layers: Any = self._find(base_model, "model_layers", "base_model")
        if not isinstance(layers, (nn.ModuleList, nn.Sequential)) or not len(layers):
            raise self._wrong(f"'model_layers' is a {type(layers).__name__}; it must be a ModuleList that is not empty")
        for field, path in self.to_dict().items():
            if path is None and field not in REQUIRED:
                continue
            if field.startswith("layer_"):
                self._find(layers[0], field, "model layer")
            for attention, where in ATTENTIONS.items() if field.startswith("attn_") else ():
                if self.to_dict()[attention] is not None:
                    self._find(self._find(layers[0], attention, "model layer"), field, where)

    def _find(self, module: nn.Module, field: str, where: str) -> nn.Module:
        path = self.to_dict()[field]
        try:
            return module.get_submodule(path)
        except (AttributeError, TypeError) as error:
            raise self._wrong(
                f"{field!r} is set to {path!r} but this value is not found in the {where}, a {type(module).__name__}; "
                f"it has {listing(list(module._modules)[:8])}"
            ) from error
