"""What 1.x calls a tensor in its files, and where it lives in a model here.

Live names are the same for every architecture (``<block>.output_adapters.adapters.NAME...``). 1.x's differ by family,
and follow the module names of transformers 4. The table lists the differences only: a model type without a row has live
names in its files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..methods.reft import orthonormal
from ..sites import Site

PARTS = ("q", "k", "v")
"""The order in which 1.x concatenates the slices of a fused projection."""


@dataclass(frozen=True)
class Family:
    """How the file names of some model types differ from live names.

    Attributes:
        sublayers: The path of a sub-layer's containers, below its block, by ``role`` or ``stack/role``.
        modules: Replacements, pattern by pattern, from transformers 5's module paths to 1.x's.
    """

    sublayers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    modules: tuple[tuple[str, str], ...] = ()


BERT = Family(
    sublayers={
        "self_attention": "attention.output",
        "cross_attention": "crossattention.output",
        "feed_forward": "output",
    }
)
IN_ENCODER = ((r"^$", "encoder"),)
"""Where invertible adapters are: here always at the base model."""
T5 = Family(
    sublayers={
        "self_attention": "layer.0",
        "cross_attention": "layer.1",
        "feed_forward": "layer.1",
        "decoder/feed_forward": "layer.2",
    },
    modules=IN_ENCODER,
)
V4_VISION_MODULES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj$", ".attention.attention.query"),
    (r"\.attention\.k_proj$", ".attention.attention.key"),
    (r"\.attention\.v_proj$", ".attention.attention.value"),
    (r"\.attention\.o_proj$", ".attention.output.dense"),
    (r"\.attention\.prefix_tuning$", ".attention.attention.prefix_tuning"),
    (r"\.mlp\.fc1$", ".intermediate.dense"),
    (r"\.mlp\.fc2$", ".output.dense"),
)
PLAIN = Family()
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("bert", "bert-generation", "roberta", "xlm-roberta", "xmod", "electra", "deberta", "deberta-v2"), BERT
    ),
    "albert": Family(sublayers={"self_attention": "attention.attention_adapters"}),
    **dict.fromkeys(("bart", "mbart", "plbart", "whisper"), Family(modules=IN_ENCODER)),
    "clip": Family(modules=((r"^$", "text_model"),)),
    "t5": T5,
    "mt5": T5,
    "vit": Family(sublayers={"feed_forward": "output.output_adapters"}, modules=V4_VISION_MODULES),
    "beit": Family(modules=V4_VISION_MODULES),
}


def family_of(model_type: str) -> Family:
    """The row of a model type; the plain one if it has none."""
    return FAMILIES.get(model_type, PLAIN)


def container_path(model_type: str, site: Site) -> str:
    """The path of a site's containers in files, relative to the base model.

    The parts of a fused projection share one path.
    """
    family = family_of(model_type)
    path = site.host_path if site.part else site.path
    if site.kind == "sublayer":
        below = family.sublayers.get(f"{site.stack}/{site.role}") or family.sublayers.get(site.role)
        path = f"{site.layer_path}.{below}" if below else path
    for pattern, replacement in family.modules:
        path = re.sub(pattern, replacement, path)
    return path


def with_aliases(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one adapter module, with the second name of a bottleneck's own norm at its input."""
    if not any(name.startswith("adapter_down.1.") for name in parameters):
        return {**parameters}
    norm, alias = "adapter_down.0.", "adapter_norm_before."
    again = {name.replace(norm, alias, 1): value for name, value in parameters.items() if name.startswith(norm)}
    return {**parameters, **again}


ORTHONORMAL = ".projection.original"
"""How the key of a LoReFT's rotation ends."""
FACTORS = (".projection.parametrizations.weight.original", ".projection.parametrizations.weight.0.base")
"""1.x keeps it as two matrices: see ``rotation_factors``."""


def written(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, with rotations as 1.x keeps them."""
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key.endswith(ORTHONORMAL):
            stem = key.removesuffix(ORTHONORMAL)
            found |= zip((stem + end for end in FACTORS), rotation_factors(orthonormal(tensor)), strict=True)
        else:
            found[key] = tensor
    return found


def rotation_factors(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """1.x's ``original`` and ``base`` for R (r, d): it makes of ``original`` a product of Householder reflections Q.

    R = (base Q)ᵀ, and with ``original`` = -I Q is the first r columns of I, so that base (d, d) starts with Rᵀ. A
    square R is base exp(original - originalᵀ).
    """
    rank, width = rotation.shape
    if rank == width:
        return torch.zeros_like(rotation), rotation
    complete = torch.linalg.qr(rotation.double().T, mode="complete").Q.to(rotation.dtype)
    base = torch.cat([rotation.T, complete[:, rank:]], 1)
    return -torch.eye(rank, width, dtype=rotation.dtype), base
