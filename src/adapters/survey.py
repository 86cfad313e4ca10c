"""Sees, in one pass on the smallest input, which modules of a model attend, and to keys and values of which shape.

Where names and shapes of projections do not tell (latent attention, fused projections, attention over channels), and
where a module computes attention itself: what cannot be followed is then known before a prefix is added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .following import PACKED, UNUSED, Follower
from .fused import attempt
from .samples import ROWS
from .signals import PrefixSignal
from .topology import Block, Core
from .trace import Call, Watcher, parts, tensors_in, watch

REPLACED = "is replaced by the model itself when it runs on a short input, where no prefix would be left"


@dataclass(frozen=True)
class Shape:
    """The keys and values of an attention: (b, heads, k, key_width) and (b, heads, k, value_width).

    batch_second: the hidden states it is given are (s, b, d); refused: why no prefix can enter it.
    """

    heads: int
    key_width: int
    value_width: int
    batch_second: bool = False
    refused: str = ""


class Survey(Watcher):
    """Notes the shape of every attention that runs in a pass."""

    def __init__(self, keep: Any = ()) -> None:
        """keep: the cores of attentions by their modules."""
        super().__init__(keep)
        self.cores = cast(Mapping[nn.Module, Core], keep)
        self.shapes: dict[nn.Module, Shape] = {}
        self._follower = Follower(self)

    def __enter__(self) -> Self:
        """With gradients on, so that operations with gradients of their own, which switch them off, are seen."""
        super().__enter__()  # type: ignore[no-untyped-call]
        torch.set_grad_enabled(True)
        return self

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        super().enter(module, args, kwargs)
        self.calls[-1].given = args, kwargs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow what `func` does."""
        given = kwargs or {}

        def run(*args: Any, **kwargs: Any) -> Any:
            return Watcher.__torch_function__(self, func, types, args, kwargs)

        try:
            return self._follower.step(run, getattr(func, "__name__", ""), args, given)
        except AdapterError as reason:
            host = self._host().module
            self.shapes[host] = replace(self.shapes.get(host, Shape(0, 0, 0)), refused=str(reason))
            return run(*args, **given)

    def refuse(self, reason: str) -> NoReturn:
        """See ``Source``."""
        raise AdapterError(reason)

    def keys(self, operand: Tensor) -> PrefixSignal:
        """See ``Source``."""
        host = self._host()
        hidden = next(tensors_in([*host.given[0], *host.given[1].values()]))
        second = hidden.dim() == 3 and hidden.shape[1] == ROWS != hidden.shape[0]
        rows = hidden.shape[1 if second else 0]
        if hidden.dim() < 3 or rows % ROWS:
            self.refuse(PACKED)
        *lead, width, _ = operand.shape
        heads = math.prod(lead) // rows // getattr(host.module, "num_key_value_groups", 1)
        shape = Shape(heads, width, 0, second)
        if self.shapes.setdefault(host.module, shape).key_width != width:
            self.refuse("attends with keys of several widths")
        self.shapes[host.module] = shape
        empty = operand.new_zeros(rows, heads, 1, width)
        return PrefixSignal(None, empty, empty, empty)

    def values(self, prefix: PrefixSignal, operand: Tensor) -> Tensor:
        """See ``Source``."""
        host, width = self._host().module, operand.shape[-1]
        shape = replace(self.shapes[host], value_width=width)
        core = self.cores.get(host)
        read = shape if core is None else replace(shape, heads=core.key_heads)
        told = {} if core is None else {part: core.projections[part].outputs for part in "kv"}
        if told == {"k": read.heads * read.key_width, "v": read.heads * width}:  # what is given may be repeated
            shape = read
        self.shapes[host] = shape
        return operand.new_zeros(*prefix.key.shape[:3], width)

    def _host(self) -> Call:
        """The innermost core that is running, or else module that has parameters."""
        cores = [call for call in self._open if call.module in self.cores]
        return cores[-1] if cores else [call for call in self._open if any(True for _ in call.module.parameters())][-1]


def survey(base_model: nn.Module, blocks: list[Block]) -> tuple[dict[nn.Module, Shape], set[nn.Module]]:
    """The shapes of the attentions of a model, and all modules that were run, as far as it can be run."""
    cores = {core.module: core for block in blocks for core in block.cores}
    shapes: dict[nn.Module, Shape] = {}
    run: set[nn.Module] = set()
    for part in parts(base_model):
        missing = [block for block in blocks if block.module not in run and block.module in set(part.modules())]
        if not missing:
            continue
        seen = Survey(cores)
        with _as_before(base_model):
            attempt(functools.partial(watch, seen, part, missing))
            gone = [module for module, core in cores.items() if base_model.get_submodule(core.path) is not module]
        run |= {call.module for call in seen.calls if call.end}
        shapes |= {module: _complete(shape) for module, shape in seen.shapes.items() if module in run}
        shapes |= {module: Shape(0, 0, 0, refused=REPLACED) for module in gone}
    return shapes, run


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Undoes what a model changes in its own modules when it runs: BigBird drops its sparse attention for good."""
    known = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, values, children in known:
            vars(module).update(values)
            module._modules.clear()
            module._modules.update(children)


def _complete(shape: Shape) -> Shape:
    unfinished = not shape.value_width and not shape.refused
    return replace(shape, refused=UNUSED) if unfinished else shape
