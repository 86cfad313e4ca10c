"""Reading what former versions wrote: old names of weights, old settings, and old mistakes.

Everything that is known about old formats is here; 1.x's names of weights, which are still written, are in `names`.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor
from transformers import CONFIG_NAME

from ..configuration.base import AdapterConfig
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

UNSAVED = ("subtract_projection", "random_uniform_scale")
"""Settings that 1.x computes with and does not save."""

LATER_OF_FUSIONS: Mapping[str, Any] = {"dropout_prob": None}
"""Settings of a fusion that adapter-transformers 1 did not have."""
LIBRARY = "adapters."
LAST_FORMER = "adapters.1.3.0"
LORA_SCALING_FIXED = Version("1.1.0")
GATED_LORA_SCALING_FIXED = LORA_VARIANTS_FIXED = CROSS_ADAPTERS_FIXED = Version("2.0.0.dev0")


def upgraded_weights(weights: Weights) -> Weights:
    """The weights under the names that 1.x gives them, each once."""
    named = {
        OLD_CONTAINER.sub(lambda match: match[1] + CONTAINERS[match[2]], key): value for key, value in weights.items()
    }
    return _with_rotations({key: value for key, value in named.items() if not POOL_ALIAS.search(key)})


def _with_rotations(weights: Weights) -> Weights:
    """1.x keeps the rotation of a LoReFT as two matrices, of which it takes the product of reflections."""
    found = dict(weights)
    for key in weights:
        stem = key.removesuffix(names.FACTORS[0])
        if stem == key or stem + names.FACTORS[1] not in weights:
            continue
        original, base = (found.pop(stem + end) for end in names.FACTORS)
        rotation, collapsed = _rotation(original, base)
        found[stem + names.ORTHONORMAL] = rotation
        source = stem + ".learned_source"
        if collapsed.any() and f"{source}.weight" in found:
            warnings.warn(
                f"{stem}: in 1.x the rotation of this LoReFT has collapsed to zero, as it does with weight decay; it "
                "is loaded without effect, as 1.x computes it, and can be trained again.",
                stacklevel=5,
            )
            found[f"{source}.weight"] = torch.where(collapsed[:, None], rotation, found[f"{source}.weight"])
            found[f"{source}.bias"] = found[f"{source}.bias"].masked_fill(collapsed, 0)
    return found


def _rotation(original: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """R (r, d) as 1.x computes it, and (r,) where it collapsed: 1.x cuts a diagonal, of -1 at first, to integers."""
    rank, width = original.shape
    if rank == width:
        lower = original.tril()
        return base @ torch.linalg.matrix_exp(lower - lower.T), torch.zeros(rank, dtype=torch.bool)
    reflections, diagonal = original.T.tril(-1).float(), original.diagonal().int()
    sizes = 2 / (1 + reflections.square().sum(0))
    signs = torch.where(diagonal > 0, 1, -1)
    product = torch.linalg.householder_product(reflections, sizes) * signs
    return (base.float() @ product).T.contiguous().to(base.dtype), diagonal == 0


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


def upgraded_models(listed: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What a whole model's config lists of adapters, as it is written today.

    1.x works with transformers 4 only and this version does not, so the version of transformers tells them apart.

    Args:
        listed: ``config.adapters``.
        config: The model's config.
    """
    if str(config.transformers_version or "").partition(".")[0] != "4":
        return dict(listed)
    crosses = bool(vars(config).get("is_decoder") and vars(config).get("add_cross_attention"))
    full = {"version": LAST_FORMER, "model_type": config.model_type}

    def upgraded(settings: Any) -> Any:
        if not isinstance(settings, Mapping):  # a name or a string of a configuration
            return settings
        keys = [".crossattention.output.adapters."] if crosses and settings.get("mh_adapter") else []
        return _upgraded(settings, full, dict.fromkeys(keys, torch.empty(0)), Path(CONFIG_NAME))

    configs = listed.get("config_map") or {}
    return {**listed, "config_map": {key: upgraded(settings) for key, settings in configs.items()}}


def completed(config: AdapterConfig, full: Mapping[str, Any], present: AdapterConfig | None) -> AdapterConfig:
    """The configuration with what 1.x did not save taken from the adapter of that name that is there, if it fits.

    So ``add_adapter("a", "direft")`` and then ``load_adapter`` reads a DiReFT of 1.x, whose file is that of a NoReFT.
    """
    if present is None or present.architecture != config.architecture:
        return config
    known = {name for name in UNSAVED if name not in full["config"] and name in config.field_names()}
    return config.replace(**{name: present[name] for name in known}) if known else config


def _upgraded(config: Mapping[str, Any], full: Mapping[str, Any], weights: Weights, file: Path) -> dict[str, Any]:
    config = dict(config)
    if config.get("architecture") == "union":
        return config | {"configs": [_upgraded(part, full, weights, file) for part in config.get("configs", [])]}
    _rename_activation(config, full)
    _flatten_invertible(config, full, weights)
    _fix_lora_scaling(config, full, file)
    _mark_lora_variants(config, full, file)
    _fix_cross_adapter(config, full, weights, file)
    return _known(config, file)


def _rename_activation(config: dict[str, Any], full: Mapping[str, Any]) -> None:
    if "version" not in full and config.get("non_linearity") in ACTIVATION_RENAME:
        config["non_linearity"] = ACTIVATION_RENAME[config["non_linearity"]]


def _flatten_invertible(config: dict[str, Any], full: Mapping[str, Any], weights: Weights) -> None:
    """Version 1 nests the settings of the invertible part; task adapters carry them without having one."""
    if nested := config.pop("invertible_adapter", None):
        config["inv_adapter"] = nested.get("block_type")
        config["inv_adapter_reduction_factor"] = nested.get("reduction_factor")
    if full.get("type") == "text_task" and not any("invertible_adapters" in key.split(".") for key in weights):
        config["inv_adapter"] = None


def _fix_lora_scaling(config: dict[str, Any], full: Mapping[str, Any], file: Path) -> None:
    """Before 1.1.0 the factor alpha / r was forgotten, with gating until 2.0: such a LoRA was trained with 1."""
    version, gated = full.get("version", ""), bool(config.get("use_gating"))
    if config.get("architecture") not in ("lora", "mtl_lora") or config.get("r") == config.get("alpha"):
        return
    faulty = gated  # as with all that adapter-transformers wrote, which states its own bare version or none
    if (written := _written_by(full, file)) is not None:
        faulty = written < (GATED_LORA_SCALING_FIXED if gated else LORA_SCALING_FIXED)
    if faulty:
        warnings.warn(
            f"{str(file)!r}: {version or 'the version'}, which wrote this LoRA, ignored alpha; alpha is set to "
            f"r = {config.get('r')}, so that it computes what it was trained for.",
            stacklevel=7,
        )
        config["alpha"] = config.get("r")


def _mark_lora_variants(config: dict[str, Any], full: Mapping[str, Any], file: Path) -> None:
    """1.x has matrices for the vectors of VeRA; its DoRA leaves alpha / r out of the norm and scales the bias."""
    variant = config.get("use_dora") or any(config.get(name) is not None for name in ("vera_d", "vera_b"))
    if config.get("architecture") == "lora" and variant:
        written = _written_by(full, file)
        config.setdefault("legacy", written is not None and written < LORA_VARIANTS_FIXED)


def _written_by(full: Mapping[str, Any], file: Path) -> Version | None:
    """The version of this library that wrote the file; None for adapter-transformers."""
    version = full.get("version", "")
    if not version.startswith(LIBRARY):
        return None
    try:
        return Version(version.removeprefix(LIBRARY))
    except InvalidVersion as error:
        raise CheckpointError(f"{str(file)!r}: 'version' is {version!r}, not like 'adapters.1.3.0'.") from error


def _fix_cross_adapter(config: dict[str, Any], full: Mapping[str, Any], weights: Weights, file: Path) -> None:
    """In BERT-like decoders 1.x puts modules after cross-attention if `mh_adapter` is set, not `cross_adapter`."""
    if (written := _written_by(full, file)) is not None and written >= CROSS_ADAPTERS_FIXED:
        return
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
