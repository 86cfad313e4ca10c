"""The tensors of an adapter or fusion in a model, under the keys of 1.x's files; comparing and filling them."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, listing
from ..sharded import is_sharded, set_whole, whole
from ..sites import Site
from . import names
from .files import Weights

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

FUSION_CONTAINER = "adapter_fusion_layer"
CONTAINERS = "|".join(
    (
        "adapters",
        "bias_adapters",
        "invertible_adapters",
        "linear_adapters",
        "loras",
        "norm_adapters",
        "prefix_gates",
        "prefix_tunings",
        "prompt_tunings",
        "refts",
        "shared_parameters",
        FUSION_CONTAINER,
    )
)
"""What stands in a key before the name of an adapter or fusion."""

OF_ADAPTERS = re.compile(rf"(?:^|\.)(?:{CONTAINERS})\.")
T = TypeVar("T")
Slots = dict[str, tuple[Tensor, ...]]
"""Live tensors by file key, without the model's prefix; the file's tensor is their concatenation on dimension 0."""


def prefix_of(model: "ModelAdaptersMixin") -> str:
    """What the keys of this model's files start with: nothing, or the base model's attribute and a dot."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def adapter_slots(model: "ModelAdaptersMixin", name: str) -> Slots:
    """The tensors of an adapter: those at its sites and those that it has once for the whole model."""
    holding = [(site, module, module.container) for site, module in model.adapter_sites.holding(name)]
    slots = _site_slots(model, name, holding)
    for path, module in model.adapter_sites.shared(name).items():
        for parameter, tensor in _tensors(module).items():
            slots[f"{path}.{parameter}"] = (tensor,)
    return slots


def fusion_slots(model: "ModelAdaptersMixin", name: str) -> Slots:
    """The tensors of a fusion."""
    holding = [(site, site.fusions[name], FUSION_CONTAINER) for site in model.adapter_sites.fusion_sites(name)]
    return _site_slots(model, name, holding)


def _site_slots(model: "ModelAdaptersMixin", name: str, holding: Sequence[tuple[Site, nn.Module, str]]) -> Slots:
    slots: dict[str, dict[str, Tensor]] = {}
    model_type = model.config.model_type
    for site, module, container in holding:
        path = names.container_path(model_type, site)
        for parameter, tensor in names.with_aliases(_tensors(module)).items():
            key = ".".join(filter(None, (path, container, name, parameter)))
            slots.setdefault(key, {})[site.part] = tensor
    joined: Slots = {}
    for key, parts in slots.items():
        ordered = {part: parts[part] for part in ("", *names.PARTS) if part in parts}
        if len({tensor.shape[1:] for tensor in parts.values()}) == 1:
            joined[key] = tuple(ordered.values())
        else:  # slices of different ranks, which 1.x does not have, stand by themselves
            joined |= {f"{key}.{part}": (tensor,) for part, tensor in ordered.items()}
    return joined


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, themselves."""
    own = module.state_dict(keep_vars=True) if module._modules or module._buffers else module._parameters
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def renamed(tensors: Mapping[str, T], old: str, new: str) -> dict[str, T]:
    """The same with every key of the adapter or fusion `old` made one of `new`; the name is compared as a whole."""
    pattern = re.compile(rf"((?:^|\.)(?:{CONTAINERS})\.){re.escape(old)}(?=\.|$)")
    return {pattern.sub(lambda match: match[1] + new, key, count=1): value for key, value in tensors.items()}


@torch.no_grad()
def gathered(slots: Slots, prefix: str) -> Weights:
    """Copies of the tensors on CPU, each with memory of its own, by file key."""
    copies = {
        prefix + key: torch.cat([whole(part).cpu() for part in parts]) if len(parts) > 1 else copied(parts[0])
        for key, parts in slots.items()
    }
    return names.written(copies)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on CPU: files must hold neither views nor two names for one memory."""
    return whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def fill(slots: Slots, weights: Mapping[str, Tensor]) -> None:
    """Copies tensors, by key without prefix, into the live ones of the same shape."""
    live: list[Tensor] = []
    values: list[Tensor] = []
    for key, tensor in weights.items():
        parts = slots[key]
        live += parts
        values += torch.split(tensor, [len(part) for part in parts]) if len(parts) > 1 else (tensor,)
    if any(map(is_sharded, live)):
        for part, value in zip(live, values, strict=True):
            set_whole(part, value)
    elif live:
        torch._foreach_copy_(live, values)


@dataclass(frozen=True)
class Fit:
    """How the weights of a file and the tensors of a model fit.

    Attributes:
        matched: The file's tensors by the model's key without prefix.
        missing: Keys that the model has and the file does not, under no other name either.
        unexpected: Keys that the file has and the model does not.
    """

    matched: Weights
    missing: list[str]
    unexpected: list[str]


def compare(slots: Slots, weights: Weights, prefixes: Iterable[str], own_prefix: str, asked: str, origin: str) -> Fit:
    """Matches keys, with any of `prefixes` or none, and checks every shape.

    Args:
        asked: The call, for messages.
        origin: What the checkpoint is of and what this model is, for messages.

    Raises:
        CheckpointError: A shape differs, or nothing in the file is for this model.
    """
    matched, unexpected = {}, []
    for key, tensor in weights.items():
        candidates = [key, *(key.removeprefix(prefix) for prefix in prefixes)]
        found = next((candidate for candidate in candidates if candidate in slots), None)
        if found is None:
            unexpected.append(key)
        else:
            matched[found] = tensor
    if not matched and (slots or weights):
        raise CheckpointError(
            f"{asked}: none of the {len(weights)} tensors in the file fits; {origin} "
            f"The file has {_some(weights)}, the model {_some(own_prefix + key for key in slots)}."
        )
    for key, tensor in matched.items():
        if (shape := _shape(slots[key])) != tuple(tensor.shape):
            raise CheckpointError(
                f"{asked}: {own_prefix + key!r} has shape {tuple(tensor.shape)} in the file and {shape} in this model; "
                f"they must be equal; {origin}"
            )
    filled = {id(part) for key in matched for part in slots[key]}
    missing = [own_prefix + key for key, parts in slots.items() if not filled.issuperset(map(id, parts))]
    return Fit(matched, missing, unexpected)


def report(fit: Fit, asked: str, loading_info: dict[str, Any] | None, complete: bool = True) -> None:
    """Warns of what did not fit, unexpected keys only if `complete`, and adds it to the caller's `loading_info`."""
    found = {"missing_keys": fit.missing, "unexpected_keys": fit.unexpected}
    if loading_info is not None:
        for key, values in found.items():
            loading_info.setdefault(key, []).extend(values)
    parts = []
    if fit.missing:
        parts.append(f"{len(fit.missing)} tensors are not in the file and keep their values ({_some(fit.missing)})")
    if fit.unexpected and complete:
        parts.append(f"{len(fit.unexpected)} tensors in the file have no place here ({_some(fit.unexpected)})")
    if parts:
        warnings.warn(f"{asked}: {' and '.join(parts)}. Check that the checkpoint is for this model.", stacklevel=5)


def _shape(parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    first = tuple(parts[0].shape)
    return first if len(parts) == 1 else (sum(len(part) for part in parts), *first[1:])


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    return listing(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
