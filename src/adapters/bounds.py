"""How much memory the config of a checkpoint may ask for: what its weights fill, and some more."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import CheckpointError

MAKERS = {torch.arange, torch.empty, torch.eye, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros}
METHODS = {Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros}
LARGE, SMALL = 4096, 0.01
"""A size in a config that is larger, or a factor that is smaller, may ask for much; others need not be watched."""
FREE = 1 << 20
"""Values that any checkpoint may ask for."""
MORE = 64
"""How often, for one value in the file."""


def bounded(asked: str, config: Any, weights: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """Within the block no more values are made than a config that belongs to these weights can want.

    Raises:
        CheckpointError: More are asked for; `asked` is the call.
    """
    if all(SMALL <= number <= LARGE for number in _numbers(config)):
        return nullcontext()
    return _Bound(asked, FREE + MORE * sum(tensor.numel() for tensor in weights.values()))


def _numbers(value: Any) -> Iterator[float]:
    """All positive numbers in a config."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        yield value


class _Bound(TorchFunctionMode):
    """Counts what is made, before it is."""

    def __init__(self, asked: str, most: int) -> None:
        super().__init__()
        self.asked, self.left = asked, most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the base."""
        kwargs = kwargs or {}
        if (func in MAKERS or func in METHODS) and str(kwargs.get("device")) != "meta":  # which takes no memory
            known = {name: value for name, value in kwargs.items() if name != "generator"}
            self.left -= func(*args, **known | {"device": "meta"}).numel()
            if self.left < 0:
                raise CheckpointError(
                    f"{self.asked}: the config asks for far more values than the file has; its sizes must be those of "
                    "the tensors. Save or download the checkpoint again."
                )
        return func(*args, **kwargs)
