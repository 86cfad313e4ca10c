"""The frozen facts of the forward pass in progress, and the contexts that users open around it.

All of it is per thread. It is a ``threading.local`` and not a ``ContextVar``, since ``torch.compile(fullgraph=True)``
cannot trace ``ContextVar.get``.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from .composition import Block, Rows, Setup, parse_composition, parse_heads_from_composition

if TYPE_CHECKING:
    from .signals import Signal
    from .sitemap import SiteMap

T = TypeVar("T")
Position = tuple[int, int]
"""A layer, and how many of its steps come before: the attention, its output, the feed-forward block's two maps."""

START: Position = (0, 0)
Report = tuple[int, Tensor | None, Tensor]
"""The number of the site, the rows (None: all), the values (b, …)."""
Reports = dict[str, dict[int, dict[str, list[Report]]]]


@dataclass(frozen=True)
class Record:
    """What a pass was asked to report: name -> layer -> location -> values."""

    gating_scores: Reports | None = None
    fusion_attentions: Reports | None = None

    @classmethod
    def of(cls, gating_scores: bool, fusion_attentions: bool) -> Self | None:
        """An empty record of what is asked for, or None if nothing is."""
        if not (gating_scores or fusion_attentions):
            return None
        return cls(_nested() if gating_scores else None, _nested() if fusion_attentions else None)


def _nested() -> Reports:
    return defaultdict(lambda: defaultdict(lambda: defaultdict(list)))


@dataclass(frozen=True)
class Forward:
    """One forward pass of one model.

    sites: the model's sites; setup: the effective composition; plans: the part of it that acts at each site, by the
    site's index; masks: by stack ("", "encoder", "decoder") the attention mask (b, s) that the model was given;
    task_ids: (b,) for MultiTask; assignment: (b,) for Rows, the child of each row; repeated: the batch already has a
    copy for every channel of Parallel; channels, batch: how many copies, of how many rows, the pass itself made of its
    inputs; shared_below: what comes before this position gives every channel the same; record: what to report;
    part: the rows that the prediction head in progress is run on, None for all.
    """

    sites: SiteMap
    setup: Block | None
    plans: tuple[Setup, ...]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    task_ids: Tensor | None = None
    assignment: Tensor | None = None
    repeated: bool = False
    channels: int = 1
    batch: int = 0
    shared_below: Position = START
    record: Record | None = None
    part: Part | None = None
    past: int | Tensor = 0
    prompt: int | None = None
    positions: Tensor | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """``compute()``, worked out once for all layers of the pass; what it gives must need no gradient."""
        if torch.compiler.is_compiling():
            return compute()
        if key not in self._kept:
            self._kept[key] = compute()
        value: T = self._kept[key]
        return value


@dataclass(frozen=True)
class Part:
    """Some rows of a batch of `total`, which a prediction head has for itself."""

    rows: slice | list[int]
    total: int

    def whole(self, values: Tensor) -> Tensor:
        """(total, …) with these values in its rows, and zeros in all others."""
        whole = values.new_zeros(self.total, *values.shape[1:])
        whole[self.rows] = values
        return whole


def report(
    kind: Literal["gating_scores", "fusion_attentions"], module: Any, values: Tensor, rows: Tensor | None
) -> None:
    """Note values (b, …) of a module for these rows, if the pass was asked for that `kind`, a field of ``Record``."""
    record = None if state.forward is None else state.forward.record
    reports = None if record is None else getattr(record, kind)
    if reports is not None:
        reports[module.name][module.layer][module.location].append((module.order, rows, values.detach()))


class _State(threading.local):
    """What this thread is doing."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.setups: tuple[AdapterSetup, ...] = ()
        self.generating: SiteMap | None = None
        self.prompt: int | None = None
        self.task_ids: Any = None


class Kept(threading.local):
    """What one hook of a site keeps for the next, per thread; copies and pickles start empty."""

    def __init__(self) -> None:
        self.residual: Tensor | None = None
        self.final: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


state = _State()


def current() -> Forward | None:
    """The pass in progress in this thread."""
    return state.forward


def keeping_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run later under the pass of now: gradient checkpointing runs a layer again in the backward pass."""
    now = state.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with within(now):
            return function(*args, **kwargs)

    return run


@contextmanager
def within(forward: Forward | None) -> Iterator[None]:
    """Under the pass `forward`, which another one may be part of."""
    previous, state.forward = state.forward, forward
    try:
        yield
    finally:
        state.forward = previous


def token_mean(values: Tensor, stack: str, signal: Signal) -> Tensor:
    """(b, k) the mean of (b, s, k) over the real tokens of each row; over all positions where no mask says more."""
    mask = None if state.forward is None else state.forward.masks.get(stack)
    if mask is not None and signal.span is not None:
        mask = mask[:, signal.span[1] :][:, : values.shape[1]]
    if mask is not None and signal.rows is not None:
        mask = mask[signal.rows]
    if mask is None or mask.shape != values.shape[:2]:
        return values.mean(1)
    weights = mask.to(values.dtype)[..., None]
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1.0)


@contextmanager
def generating(sites: SiteMap, prompt: int | None) -> Iterator[None]:
    """While ``generate`` runs: the inputs of `sites`' model were repeated for Parallel once, at its start.

    prompt: the length of the prompt; None is that of the first pass. ``state.task_ids`` are those of its rows, for
    passes that ``generate`` does not give them to, such as those of guidance.
    """
    previous = state.generating, state.prompt, state.task_ids
    state.generating, state.prompt, state.task_ids = sites, prompt, None
    try:
        yield
    finally:
        state.generating, state.prompt, state.task_ids = previous


@dataclass(eq=False)
class AdapterSetup:
    """Within the ``with`` block, in this thread, `adapter_setup` acts in place of the active adapters.

    Args:
        adapter_setup: a name, block or list as for ``set_active_adapters``; None switches adapters off.
        head_setup: heads to use; without it they follow from `adapter_setup`.
        ignore_empty: with both setups None, leave an outer context (or the active adapters) in force.

    Example:
        >>> with AdapterSetup("sst-2"):
        ...     model(**inputs)
    """

    adapter_setup: Any
    head_setup: Any = None
    ignore_empty: bool = False
    assignment: tuple[int, ...] | None = field(default=None, init=False)
    owner: SiteMap | None = field(default=None, init=False, repr=False)
    _outer: list[tuple[AdapterSetup, ...]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Parse the setup; whether its names exist is known only when a model runs."""
        self.adapter_setup = parse_composition(self.adapter_setup)
        if self.head_setup is None and self.adapter_setup is not None:
            self.head_setup = parse_heads_from_composition(self.adapter_setup)
        self._empty = self.ignore_empty and self.adapter_setup is None and self.head_setup is None

    @classmethod
    def of_names(cls, adapter_names: Any, owner: SiteMap) -> Self:
        """The setup that ``adapter_names`` of a call of one model asks for.

        A list has one setup for each row of the batch, in which None and ``"__base__"`` are the unadapted model; a name
        or a block is the setup of all rows.
        """
        rowwise = isinstance(adapter_names, (list, tuple))
        given = adapter_names if rowwise else [adapter_names]
        named = [None if name == "__base__" else parse_composition(name, level=None) for name in given]
        children = list(dict.fromkeys(named))
        setup = cls(Rows(*children) if rowwise else named[0])
        setup.owner = owner
        if rowwise:
            setup.assignment = tuple(children.index(name) for name in named)
        return setup

    def __enter__(self) -> Self:
        """Put the setup in force."""
        self._outer.append(state.setups)
        if not self._empty:
            state.setups = (*state.setups, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore what was in force before."""
        state.setups = self._outer.pop()

    @classmethod
    def get_contexts(cls) -> list[AdapterSetup]:
        """All open contexts of this thread, outermost first."""
        return list(state.setups)

    @classmethod
    def get_context(cls) -> AdapterSetup | None:
        """The innermost open context of this thread."""
        return state.setups[-1] if state.setups else None

    @classmethod
    def acting_on(cls, sites: SiteMap) -> AdapterSetup | None:
        """The innermost open context of this thread that concerns a model: ``adapter_names`` concerns one alone."""
        for setup in reversed(state.setups):
            if setup.owner is None or setup.owner is sites:
                return setup
        return None

    @classmethod
    def get_context_adapter_setup(cls) -> Block | None:
        """The adapter setup of the innermost context."""
        context = cls.get_context()
        return context.adapter_setup if context else None

    @classmethod
    def get_context_head_setup(cls) -> Any:
        """The head setup of the innermost context."""
        context = cls.get_context()
        return context.head_setup if context else None
