"""Whole models that 1.x's ``save_pretrained`` wrote: adapters and fusions have 1.x's names among the weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

from .files import Weights
from .legacy import upgraded_weights
from .weights import OF_ADAPTERS, Slots, adapter_slots, fusion_slots, prefix_of

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin


def load_weights(model: Any, weights: Weights | None, files: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
    """The step of ``from_pretrained`` that reads the files, in which adapters and fusions are given their names here.

    A file that holds them under these names already is left to transformers, which reads it tensor by tensor.
    """
    if weights is None and files and len(model.adapters_config):
        live = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
        if any(OF_ADAPTERS.search(key) for key in _keys(files).difference(live.values())):
            whole = {key: tensor for file in files for key, tensor in load_state_dict(file).items()}
            weights = _named(_slots(model), live, whole)
    return cast(Any, PreTrainedModel)._load_pretrained_model(model, weights, files, *args, **kwargs)


def _slots(model: "ModelAdaptersMixin") -> Slots:
    """The tensors of all adapters and fusions, by the key of 1.x's whole models."""
    found: Slots = {}
    for name in model.adapters_config:
        found |= adapter_slots(model, name)
    for name in model.adapters_config.fusions:
        found |= fusion_slots(model, name)
    return {prefix_of(model) + key: parts for key, parts in found.items()}


def _keys(files: Sequence[str]) -> set[str]:
    """The names of all tensors in files."""
    found: set[str] = set()
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= {*opened.keys()}
        else:
            found |= {*load_state_dict(file, map_location="meta")}
    return found


def _named(slots: Slots, live: Mapping[int, str], weights: Weights) -> Weights:
    """All weights of a file under the names that they have in the model, `live` by the identity of its tensors."""
    own = {key: tensor for key, tensor in weights.items() if OF_ADAPTERS.search(key)}
    found = {key: tensor for key, tensor in weights.items() if key not in own}
    for key, tensor in upgraded_weights(own).items():
        parts = slots.get(key)
        if parts is None:
            found[key] = tensor
            continue
        pieces = torch.split(tensor, [len(part) for part in parts]) if len(parts) > 1 else (tensor,)
        found |= {live[id(part)]: piece for part, piece in zip(parts, pieces, strict=True)}
    return found
