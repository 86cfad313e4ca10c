"""Computing a linear map with another weight: one product with W + ΔW in place of Wx and ΔW x.

A hook comes too late to save the product with W, so the host's forward is replaced while such adapters sit there. A map
that is never called, because its parent hands its weight to a function of torch, has no other way at all: while the
parent runs it shows another weight.
"""

from __future__ import annotations

import dis
import functools
import threading
from inspect import isfunction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from .composition import Setup
from .merging import worked_in

if TYPE_CHECKING:
    from .sites import LinearSite

FORWARD, LENT = "forward", ("weight", "bias")
LOADS = ("LOAD_ATTR", "LOAD_METHOD")
EXACT = (torch.float32, torch.float64)
"""In these a small change of a weight survives its addition to the weight."""
_LENT = threading.RLock()
"""Held by the thread for which a map shows another weight."""


class StandIn:
    """Stands in for the forward of a site's host, if that is plain and nobody else does."""

    def __init__(self, site: LinearSite) -> None:
        self.site = site
        self._handles: list[RemovableHandle] = []

    @functools.cached_property
    def reader(self) -> nn.Module | None:
        """The parent of a map that is never called; None if it is."""
        path, _, name = self.site.host_path.rpartition(".")
        parent: nn.Module = self.site.owner.anatomy.base_model.get_submodule(path)
        kind: Any = type(parent)
        return parent if name in _read_by(kind) else None

    def attach(self, changes_weight: bool) -> None:
        """Take the forward's place for an adapter that changes the weight, and the weight's of a map that is read."""
        host, reader = self.site.host, self.reader
        if reader is not None and not self._handles:
            self._handles = [
                reader.register_forward_pre_hook(self.lend),
                reader.register_forward_hook(self.take_back, always_call=True),
            ]
        if reader is None and changes_weight and type(host) is nn.Linear:
            vars(host).setdefault(FORWARD, self.forward)

    def detach(self) -> None:
        """Give it back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._is_there:
            del vars(self.site.host)[FORWARD]

    def lend(self, *_: Any) -> None:
        """Let the map show the weight and the bias with the adapters worked in."""
        site, plan = self.site, self.site.plan()
        if plan is None:
            return
        shown = dict(zip(LENT, worked_in(site, plan, site.weight, site.bias, f"at {site.path}"), strict=True))
        _LENT.acquire()
        vars(site.host).update(shown)

    def take_back(self, *_: Any) -> None:
        """Let it show its own again."""
        lent = [vars(self.site.host).pop(name) for name in LENT if name in vars(self.site.host)]
        if lent:
            _LENT.release()

    @property
    def _is_there(self) -> bool:
        return bool(vars(self.site.host).get(FORWARD) == self.forward)

    def forward(self, input: Tensor) -> Tensor:
        """Wx + b, with the weight of an adapter that acts alone."""
        site, plan = self.site, self.site.plan()
        weight = site.adapters[str(plan)].replaced_weight(site.weight) if self.acts(plan, input) else site.weight
        return linear(input, weight, site.bias)

    def acts(self, plan: Setup, x: Tensor) -> bool:
        """Whether that is all an adapter does to x: then there is nothing to add to the output."""
        if not isinstance(plan, str) or not self.site.adapters[plan].changes_weight:
            return False
        exact = self.site.weight.dtype in EXACT and not torch.is_autocast_enabled(x.device.type)
        return exact and self.site.adapters[plan].replaces_weight and self._is_there


@functools.cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes of which a module's code never takes more than ``weight`` and ``bias``."""
    taken: dict[str, set[str]] = {}
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for function in filter(isfunction, vars(base).values()):
            for one, other in pairwise(dis.get_instructions(function)):
                if one.opname in LOADS:
                    taken.setdefault(one.argval, set()).add(other.argval if other.opname in LOADS else "")
    return frozenset(name for name, uses in taken.items() if "weight" in uses and uses <= set(LENT))
