"""What an adapter method has to say, and the table of those that exist."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration.base import AdapterConfig
from .context import report
from .errors import AdapterError, CompositionError
from .grouping import Group
from .signals import Signal
from .sites import Site

S = TypeVar("S", bound=Signal)
M = TypeVar("M", bound="type[AdapterModule[Any]]")

METHODS: dict[type[AdapterConfig], list[type[AdapterModule[Any]]]] = {}


class AdapterModule(nn.Module, ABC, Generic[S]):
    """One adapter at one site.

    common: the names of the parameters that adapters may have in common (``share_parameters``);
    container: the name under which such modules stand in a state dict (``<site>.<container>.<adapter>.…``);
    shared_container: the same for what the modules of one adapter share, at the base model;
    name, layer, location, order: whose module this is and where, and the site's number, set by the site;
    transforms_input: at a linear map, ``transform_input`` says what the map is given in place of x;
    changes_weight: at a linear map, whether it changes the weight and nothing else, so that where it acts alone the map
    is computed with ``replaced_weight`` and ``forward`` is not called, as long as ``replaces_weight`` says so.
    """

    common: ClassVar[tuple[str, ...]] = ()
    container: ClassVar[str]
    name: str
    layer: int
    location: str
    order: int
    shared_container: ClassVar[str] = "shared_parameters"
    transforms_input: ClassVar[bool] = False
    changes_weight: ClassVar[bool] = False
    site_type: ClassVar[type[Site]]

    @classmethod
    @abstractmethod
    def wants(cls, config: Any, site: Any) -> bool:
        """Does `config` put a module at `site`?"""

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Does this class build the modules of `config` at all? One configuration may describe several methods."""
        return True

    @classmethod
    def asks_for(cls, config: Any) -> set[str]:
        """The locations where `config` explicitly asks for modules; a model without one of them is refused."""
        return set()

    @abstractmethod
    def forward(self, signal: S) -> S:
        """The mathematics of the method: a signal in, a signal of the same rows out."""

    def transform_input(self, x: Tensor) -> Tensor:
        """(b, s, in) what the map is given in place of x (b, s, in), where this adapter acts alone.

        ``forward`` is called all the same, with a signal that is ``transformed``. In a block, and at a slice of a fused
        map, it is called with a signal that is not, and adds to Wx.
        """
        raise NotImplementedError

    @property
    def replaces_weight(self) -> bool:
        """Whether ``replaced_weight`` says all that it does at this moment; dropout of its input, say, forbids it."""
        return self.changes_weight

    def replaced_weight(self, weight: Tensor) -> Tensor:
        """(out, in) what the map is computed with in place of its weight, where this adapter acts alone."""
        raise NotImplementedError

    @classmethod
    def share(cls, config: Any, sites: Sequence[Any]) -> nn.Module | None:
        """What the modules of one adapter at `sites` have in common, if anything; each gets it as ``shared``."""
        return None

    def group_key(self) -> Hashable:
        """Modules of one class with equal keys can be computed in one call, by ``grouped``; None: this one cannot."""
        return None

    @classmethod
    def grouped(cls, group: Group, signal: S, index: Tensor | None) -> S:
        """As ``forward``, for rows of several modules.

        index: (b,) the number of each row's module in the group; None: the rows come in equal parts, in order.
        """
        raise NotImplementedError

    def check_experts(self, names: Sequence[str]) -> None:
        """Refuse, unless this is a gate over the adapters of these names, as ``Route`` needs one."""
        raise CompositionError(
            f"Route(gate={self.name!r}): it is a {type(self).__name__}, no gate; add one with "
            f"add_adapter(…, RouterConfig(experts={list(names)}))."
        )

    def mix(self, signal: S, children: Sequence[str]) -> list[Tensor]:
        """For each of these experts its weight (b, s or 1, 1) in the mix of ``Route``."""
        raise NotImplementedError

    def report_gate(self, gate: Tensor, signal: Signal) -> None:
        """Note the gate (b, k) of a signal's rows where the forward call asks for ``output_adapter_gating_scores``."""
        report("gating_scores", self, gate, signal.rows)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The weight (out, in) of the site's linear map with this adapter worked in."""
        raise AdapterError(
            f"merge_adapter: {type(self).__name__} cannot be merged into a weight; LoRA can. Keep it active instead."
        )

    def merged_bias(self, bias: Tensor) -> Tensor:
        """The bias (out,) of the site's linear map with this adapter worked in."""
        return bias


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a generator of this seed within the block and leave the global one as it was; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Filling(threading.local):
    """Whether this thread makes adapters that are filled at once."""

    def __init__(self) -> None:
        self.follows = False


_filling = _Filling()


@contextmanager
def filled_later() -> Iterator[None]:
    """Adapters made within the block get their weights from a file: a start that costs much need not be computed."""
    previous, _filling.follows = _filling.follows, True
    try:
        yield
    finally:
        _filling.follows = previous


def weights_follow() -> bool:
    """Whether what is made now is filled from a file."""
    return _filling.follows


def activation(name: str) -> nn.Module:
    """The activation of that name: one of transformers' or ``leakyrelu``."""
    if name.lower() == "leakyrelu":
        return nn.LeakyReLU()
    module: nn.Module = ACT2FN[name.lower()]
    return module


def register(config_type: type[AdapterConfig], site_type: type[Site]) -> Callable[[M], M]:
    """Enter a method: adapters with a `config_type` may have such a module at every `site_type`."""

    def enter(module_type: M) -> M:
        module_type.site_type = site_type
        METHODS.setdefault(config_type, []).append(module_type)
        return module_type

    return enter


def methods_of(config: AdapterConfig) -> list[type[AdapterModule[Any]]]:
    """The module classes for a configuration.

    Raises:
        AdapterError: this version has no implementation of the method.
    """
    kinds = {*type(config).__mro__}  # isinstance takes far longer for classes derived from Mapping
    candidates = (cls for kind, classes in METHODS.items() if kind in kinds for cls in classes)
    found = [cls for cls in candidates if cls.takes(config)]
    if not found:
        known = sorted({kind.__name__ for kind in METHODS})
        raise AdapterError(
            f"add_adapter(config={type(config).__name__}): this version has no implementation of it; "
            f"it has those of {', '.join(known)} and their subclasses."
        )
    return found
