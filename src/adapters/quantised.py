"""Linear maps whose weight is quantised: reading it, storing another in the same format, and training through it.

A format is known by what a layer keeps of its weight, not by the layer's class. bitsandbytes' formats are read and
written; of any other the weight is read off the map itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .topology import linear_shape


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight is not kept as plain floating numbers."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return False
    if linear_shape(module) is None:
        return False
    return weight is None or _is_4bit(weight) or not weight.is_floating_point() or _reads_itself(weight)


def _is_4bit(weight: Tensor | None) -> bool:
    return weight is not None and "quant_state" in vars(weight)


def _is_8bit(weight: Tensor | None) -> bool:
    return weight is not None and "SCB" in vars(weight)


def _reads_itself(weight: Tensor) -> bool:
    """A subclass of tensors with a ``dequantize`` of its own, such as torchao's and quanto's."""
    return type(weight).dequantize is not Tensor.dequantize


@torch.no_grad()
def dequantised(module: Any) -> Tensor:
    """W (out, in) of a quantised map."""
    weight: Any = module._parameters.get("weight")
    found: Tensor
    if _is_4bit(weight):
        from bitsandbytes.functional import dequantize_4bit

        weight = _unpacked(module)
        found = dequantize_4bit(weight.data, weight.quant_state)
        return found
    if _is_8bit(weight):
        scales = module.state.SCB if weight.SCB is None else weight.SCB
        found = weight.data.float() * (scales / 127)[:, None]
        return found
    if weight is not None and _reads_itself(weight):
        found = weight.dequantize()
        return found
    return _read_off(module)


def _unpacked(module: Any) -> Any:
    """The weight as bitsandbytes quantised it: its first pass in evaluation mode on a CPU orders it anew, in place."""
    if not vars(module.weight.quant_state).get("packing_format_for_cpu"):
        return module.weight
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["_parameters"] = {"weight": deepcopy(module.weight), "bias": None}
    twin._save_to_state_dict({}, "", False)  # the only way back that it offers
    return twin.weight


def _read_off(module: Any) -> Tensor:
    """W from what the map makes of the unit vectors."""
    inputs, _ = linear_shape(module) or (0, 0)
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    units = torch.eye(inputs + 1, inputs, dtype=dtype, device=tensors[0].device)  # the last row, zero, gives the bias
    rows: Tensor = type(module).forward(module, units)
    return (rows[:-1] - rows[-1]).T


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of a map of bitsandbytes as it was: the parameter, and what the layer keeps of it besides."""

    module: Any
    weight: Any
    beside: dict[str, Any]

    @classmethod
    def of(cls, module: Any) -> QuantisedWeight:
        """That of a map.

        Raises:
            AdapterError: weights cannot be quantised in this format here.
        """
        weight = module._parameters.get("weight")
        if _is_4bit(weight):
            return cls(module, weight, {"quant_state": module.quant_state})
        if _is_8bit(weight):
            return cls(module, weight, {"CB": module.state.CB, "SCB": module.state.SCB})
        raise AdapterError(
            f"merge_adapter: the weight of a {type(module).__name__} can be read, but not be quantised anew; only "
            "those of bitsandbytes can. Keep the adapter active instead, or load the model without quantising it."
        )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block the map's weight is W in floating numbers; after it, it is quantised as before."""
        like = _unpacked(self.module) if _is_4bit(self.weight) else self.weight
        own = {"quant_state": None, "bnb_quantized": False} if _is_4bit(like) else {"CB": None, "SCB": None}
        self.module.weight = nn.Parameter(dequantised(self.module), requires_grad=False)
        yield
        wide = self.module.weight.data.cpu()  # moving it away from a CPU, or to one, quantises
        settings = vars(like) | own | {"requires_grad": False}
        self.module.weight = type(like)(wide, **settings).to(self.weight.device)

    def put_back(self) -> None:
        """As it was, bit for bit."""
        self.module.weight = self.weight
        kept = self.module if _is_4bit(self.weight) else self.module.state
        for name, value in self.beside.items():
            setattr(kept, name, value)


@contextmanager
def shapes_alone(model: nn.Module) -> Iterator[None]:
    """Quantised maps and fused experts, which have no meta form, give tensors of the right shape."""
    fused = "has_post_expert_norm"  # every module of experts has it that transformers can compute in several ways
    maps = [module for module in model.modules() if is_quantised(module) or fused in vars(module)]
    own = [vars(module).get("forward") for module in maps]
    for module in maps:
        _, outputs = linear_shape(module) or (0, 0)
        vars(module)["forward"] = lambda x, *_, outputs=outputs: x.new_zeros(*x.shape[:-1], outputs or x.shape[-1])
    try:
        yield
    finally:
        for module, forward in zip(maps, own, strict=True):
            vars(module).pop("forward")
            if forward is not None:  # a wrapper's, such as accelerate's
                vars(module)["forward"] = forward


def keep_differentiable(model: nn.Module) -> None:
    """Let gradients through 4-bit maps on a CPU: the order that bitsandbytes gives weights there lets none through."""
    for module in model.modules():
        if vars(module).get("support_avx512bf16_for_cpu") and _is_4bit(module._parameters.get("weight")):
            weight = _unpacked(module)
            vars(module)["support_avx512bf16_for_cpu"] = False
            module.weight, module.quant_state = weight, weight.quant_state
