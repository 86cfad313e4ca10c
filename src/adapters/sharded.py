"""Tensors of which each process has a part: FSDP2 and tensor parallelism make parameters ``DTensor``."""

import sys
from typing import Any

import torch
from torch import Tensor


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
