"""Whether a method has a meaning on a model, told from one pass of the bare model: the library has no say in it.

A cell without a meaning is refused, and counts neither for nor against the library. What a method cannot do without:

=============  =========================================================================================================
``maps``       a linear map or a convolution that is called, or the weight of one that is read
``residual``   an addition of two states of one shape (a sub-layer's output and the stream)
``attention``  weights that a softmax gave multiply values
``sequence``   attention, or a table of token embeddings that is looked up: something along which an input can be longer
``blocks``     a list of two modules or more of one class, with parameters
=============  =========================================================================================================
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

NEEDS: dict[str, tuple[str, ...]] = {
    "lora": ("maps",),
    "ia3": ("maps",),
    "seq_bn": ("residual",),
    "double_seq_bn": ("residual", "attention"),
    "loreft": ("blocks",),
    "prefix_tuning": ("attention",),
    "prompt_tuning": ("sequence",),
}
LACKS: dict[str, str] = {
    "maps": "it has no linear map and no convolution",
    "residual": "nothing in it is added to a residual stream",
    "attention": "no weights of a softmax multiply values in it, so it has no attention",
    "sequence": "it neither attends nor looks tokens up, so nothing in it can be longer",
    "blocks": "it has no list of equal blocks",
}
SAME = {"dropout", "to", "type_as", "float", "half", "type", "masked_fill", "view", "reshape", "flatten", "unsqueeze"}
SAME |= {"squeeze", "transpose", "permute", "contiguous", "expand", "__getitem__", "nan_to_num", "bfloat16", "clone"}
PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}
ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
MAPS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Seen(TorchFunctionMode):
    """Notes the facts of a pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.facts = {"blocks"} if _has_blocks(model) else set()
        self.facts |= {"maps"} if any(isinstance(module, MAPS) for module in model.modules()) else set()
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if name in ATTENTION:
            self.facts |= {"attention", "sequence"}
        elif name == "embedding" and given[0].dim() > 1:
            self.facts.add("sequence")
        elif name in ADDS and len(given) > 1 and given[0].dim() > 2 and given[0].shape == given[1].shape:
            self.facts |= {"residual"} if given[0].is_floating_point() else set()
        elif name in PRODUCTS and len(given) > 1 and any(id(value) in self._weights for value in given):
            self.facts |= {"attention", "sequence"}
        if isinstance(result, Tensor) and (
            "softmax" in name or (name in SAME and given and id(given[0]) in self._weights)
        ):
            self._weights[id(result)] = result
        return result


def _has_blocks(model: nn.Module) -> bool:
    lists = (module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential)))
    return any(
        len(children) > 1 and len({type(child) for child in children}) == 1 and len([*children[0].parameters()]) > 0
        for children in (list(found) for found in lists)
    )


def facts_of(model: nn.Module, batch: dict[str, Any]) -> set[str]:
    """What one pass of the bare model shows."""
    seen = Seen(model)
    with torch.no_grad(), seen:
        model(**copy.deepcopy(batch))
    return seen.facts


def lacking(method: str, facts: set[str]) -> str:
    """Why the method has no meaning; "" if it has one."""
    return next((LACKS[need] for need in NEEDS[method] if need not in facts), "")
