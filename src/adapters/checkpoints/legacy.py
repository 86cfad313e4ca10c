"""Reading what former versions wrote: old names of weights, old settings, and old mistakes.

Everything that is known about old formats is here; 1.x's names of weights, which are still written, are in `names`.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ..configuration.registry import ARCHITECTURES
from ..errors import CheckpointError, listing
from . import names
from .files import Weights

ACTIVATION_RENAME = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What activations were called in files that state no version."""

CONTAINERS = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
OLD_CONTAINER = re.compile(rf"(^|\.)({'|'.join(CONTAINERS)})(?=\.)")
POOL_ALIAS = re.compile(r"(^|\.)prefix_tuning\.pool\.prefix_tunings\.")
"""1.x writes every prefix once more for each attention module that uses it."""

LIBRARY = "adapters."
LORA_SCALING_FIXED = Version("1.1.0")
GATED_LORA_SCALING_FIXED = Version("2.0.0.dev0")


def upgraded_weights(weights: Weights) -> Weights:
    """The weights under the names that 1.x gives them, each once."""
    named = {
        OLD_CONTAINER.sub(lambda match: match[1] + CONTAINERS[match[2]], key): value for key, value in weights.items()
    }
    return {key: value for key, value in named.items() if not POOL_ALIAS.search(key)}


def upgraded_config(full: Mapping[str, Any], weights: Weights, file: Path) -> dict[str, Any]:
    """The method's settings in a config file, as they are written today.

    Args:
        full: The whole content of the file.
        weights: The weights beside it, upgraded.

    Raises:
        CheckpointError: The file has no settings, or those of a method that is unknown.
    """
    config = full.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(file)!r}: 'config' is {config!r}; it must hold the settings of an adapter.")
    return _upgraded(config, full, weights, file)


def _upgraded(config: Mapping[str, Any], full: Mapping[str, Any], weights: Weights, file: Path) -> dict[str, Any]:
    config = dict(config)
    if config.get("architecture") == "union":
        return config | {"configs": [_upgraded(part, full, weights, file) for part in config.get("configs", [])]}
    _rename_activation(config, full)
    _flatten_invertible(config, full, weights)
    _fix_lora_scaling(config, full, file)
    _fix_cross_adapter(config, full, weights)
    return _known(config, file)


def _rename_activation(config: dict[str, Any], full: Mapping[str, Any]) -> None:
    if "version" not in full and config.get("non_linearity") in ACTIVATION_RENAME:
        config["non_linearity"] = ACTIVATION_RENAME[config["non_linearity"]]


def _flatten_invertible(config: dict[str, Any], full: Mapping[str, Any], weights: Weights) -> None:
    """Version 1 nests the settings of the invertible part; task adapters carry them without having one."""
    if nested := config.pop("invertible_adapter", None):
        config["inv_adapter"] = nested.get("block_type")
        config["inv_adapter_reduction_factor"] = nested.get("reduction_factor")
    has_weights = any("invertible_adapters" in key.split(".") for key in weights)
    if full.get("type") == "text_task" and not has_weights:
        config["inv_adapter"] = None


def _fix_lora_scaling(config: dict[str, Any], full: Mapping[str, Any], file: Path) -> None:
    """Before 1.1.0 the factor alpha / r was forgotten, with gating until 2.0: such a LoRA was trained with 1."""
    version, gated = full.get("version", ""), bool(config.get("use_gating"))
    if config.get("architecture") != "lora" or config.get("r") == config.get("alpha"):
        return
    faulty = gated  # as with all that adapter-transformers wrote, which states its own bare version or none
    if version.startswith(LIBRARY):
        try:
            written = Version(version.removeprefix(LIBRARY))
        except InvalidVersion as error:
            raise CheckpointError(f"{str(file)!r}: 'version' is {version!r}, not like 'adapters.1.3.0'.") from error
        faulty = written < (GATED_LORA_SCALING_FIXED if gated else LORA_SCALING_FIXED)
    if faulty:
        warnings.warn(
            f"{str(file)!r}: {version or 'the version'}, which wrote this LoRA, ignored alpha; alpha is set to "
            f"r = {config.get('r')}, so that it computes what it was trained for.",
            stacklevel=7,
        )
        config["alpha"] = config.get("r")


def _fix_cross_adapter(config: dict[str, Any], full: Mapping[str, Any], weights: Weights) -> None:
    """In BERT-like decoders 1.x puts modules after cross-attention if `mh_adapter` is set, not `cross_adapter`."""
    if names.family_of(full.get("model_type", "")) is names.BERT and "mh_adapter" in config:
        config["cross_adapter"] = any(".crossattention.output.adapters." in key for key in weights)


def _known(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings without those that no method has any more."""
    method = ARCHITECTURES.get(config.get("architecture"))
    if method is None:  # which is reported where the configuration is made
        return config
    known = {"architecture", *method.field_names()}
    if unknown := [key for key in config if key not in known]:
        warnings.warn(f"{str(file)!r}: settings of a former version are ignored: {listing(unknown)}.", stacklevel=7)
    return {key: value for key, value in config.items() if key in known}
