"""What is computed from parameters alone, kept for as long as they do not change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


class _Steps:
    """Counts the steps of all optimizers: a fused one changes parameters and leaves their versions as they were."""

    count = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1


STEPS = _Steps()
register_optimizer_step_post_hook(STEPS)


class Derived:
    """Values by key, each with the state of the parameters it was computed from; copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Hashable, Any]] = {}

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()

    def get(self, key: Hashable, parameters: Iterable[Tensor], compute: Callable[[], T]) -> T:
        """``compute()``, or what it gave before. It is computed each time where a gradient is to flow through it."""
        # FSDP writes what it gathers into a parameter's memory and leaves the version as it was.
        if torch.compiler.is_compiling() or (distributed.is_available() and distributed.is_initialized()):
            return compute()
        stamp: list[Hashable] = [torch.is_inference_mode_enabled(), STEPS.count]
        for parameter in parameters:
            # A tensor made in inference mode has no version, a change of it is not seen.
            if parameter.is_inference() or (parameter.requires_grad and torch.is_grad_enabled()):
                return compute()
            stamp.append((parameter.data_ptr(), parameter._version, parameter.dtype))
        state = tuple(stamp)
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            kept = self._kept[key] = (state, compute())
        value: T = kept[1]
        return value
