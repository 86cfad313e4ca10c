"""Parameters that are not whole, or not here: parts in several processes, or kept elsewhere until a module runs.

FSDP2 and tensor parallelism make them ``DTensor``; accelerate's ``device_map`` puts them on a meta device.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes share the tensor out; there is none where torch's module for it was never imported."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """The tensor, or all of one that is shared out: then every process has to ask for it at the same time."""
    complete: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return complete


@torch.no_grad()
def set_whole(tensor: Any, value: Tensor) -> None:
    """Copy `value`, which every process has, into the tensor, or each its part into one that is shared out."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def computed_in_parts(module: nn.Module) -> bool:
    """Whether tensor parallelism lets each process compute a part of what the module gives."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # to look at all parameters, those of adapters included, takes longer with each adapter
    found: list[Any] = [parameter for parameter in module.parameters() if is_sharded(parameter)]
    return any("tp" in (each.device_mesh.mesh_dim_names or ()) and not all_here(each) for each in found)


def all_here(tensor: Any) -> bool:
    """Whether each process has all of a ``DTensor``."""
    return all(placement.is_replicate() for placement in tensor.placements)


def loaded(module: nn.Module, name: str) -> Any:
    """A parameter of a module; of one that is kept elsewhere until the module runs, what it will be then."""
    tensor: Any = getattr(module, name)
    hook = _offloads(module)
    return hook.weights_map[name].to(hook.execution_device) if hook is not None and tensor.is_meta else tensor


def device_at(module: nn.Module, tensor: Tensor) -> torch.device:
    """The device of a tensor of the module; of one that is kept elsewhere, where the module runs."""
    hooks: Iterator[Any] = filter(None, map(_offloads, module.modules())) if tensor.is_meta else iter(())
    return next((torch.device(hook.execution_device) for hook in hooks), tensor.device)


def _offloads(module: nn.Module) -> Any:
    """The hook by which accelerate loads the module's parameters when it runs; None if there is none."""
    hook = vars(module).get("_hf_hook")
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)


@contextmanager
def without_loading(model: nn.Module) -> Iterator[None]:
    """Modules run without what accelerate does around them: for passes that need no weights."""
    wrapped = [vars(module) for module in model.modules() if {"forward", "_old_forward"} <= vars(module).keys()]
    forwards = [each["forward"] for each in wrapped]
    for each in wrapped:
        each["forward"] = each["_old_forward"]
    try:
        yield
    finally:
        for each, forward in zip(wrapped, forwards, strict=True):
            each["forward"] = forward
