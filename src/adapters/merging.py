"""Working adapters into the weights of the model, and putting back what was there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .composition import Average, Block, Setup, Stack
from .errors import AdapterError, CompositionError, listing
from .quantised import QuantisedWeight, is_quantised
from .sharded import is_sharded

if TYPE_CHECKING:
    from .sites import Site


@dataclass(frozen=True)
class Stored:
    """What a site's host held before the merge; None where it has no such parameter, or another keeps it."""

    site: Site
    weight: Tensor | None
    bias: Tensor | None

    def put_back(self) -> None:
        """As it was, bit for bit."""
        self.site.write(self.weight, self.bias)


class Merge:
    """A setup that is worked into the weights of its sites, with the weights as they were.

    A module says what becomes of its site's weight and bias by ``merged_weight`` and ``merged_bias``; a site says what
    it has of them by ``weight`` and ``bias``, which may be views of a part of a parameter. Such sites skip these
    adapters.
    The sums are computed in single precision at least, and rounded once; quantised weights are quantised once.
    """

    def __init__(self, setup: Setup, plans: Iterable[tuple[Site, Setup]], modules: Iterable[nn.Module]) -> None:
        """Merge; if one module cannot be merged, nothing is.

        setup: names, Stack and Average; plans: the part of it at each of its sites; modules: all its modules.

        Raises:
            AdapterError: a module cannot be merged, or weights are quantised in a format that is not written here.
            CompositionError: another block is in the setup.
        """
        self.setup, self.asked = setup, f"merge_adapter({setup!r})"
        self._stored: list[Stored | QuantisedWeight] = []
        _check(self.asked, setup)
        by_host: dict[int, list[tuple[Site, Setup]]] = {}
        for site, plan in plans:
            by_host.setdefault(id(site.host), []).append((site, plan))
        try:
            with torch.no_grad(), _in_single_precision(modules):
                for places in by_host.values():
                    self._merge_all(places)
        except BaseException:
            self.undo()
            raise

    @property
    def names(self) -> frozenset[str]:
        """The adapters that are in the weights."""
        return frozenset(self.setup.flatten() if isinstance(self.setup, Block) else [str(self.setup)])

    def _merge_all(self, places: list[tuple[Site, Setup]]) -> None:
        """Merge at the sites of one host."""
        host = places[0][0].host
        if not is_quantised(host):
            for site, plan in places:
                self._merge(site, plan, quantised=False)
            return
        kept = QuantisedWeight.of(host)
        self._stored.append(kept)
        with kept.opened():
            for site, plan in places:
                self._merge(site, plan, quantised=True)

    def _merge(self, site: Site, plan: Setup, quantised: bool) -> None:
        weight, bias = site.weight, site.bias
        if site.reference.is_meta or is_sharded(site.reference):
            raise AdapterError(
                f"{self.asked}: the weights at {site.path} are not here, but offloaded or shared out over processes; "
                "merge into a model that was loaded in one piece."
            )
        if weight is None or not weight.is_floating_point():
            names = plan.leaves() if isinstance(plan, Block) else [str(plan)]
            kinds = {name: type(site.adapters[name]).__name__ for name in names if name in site.adapters}
            raise AdapterError(
                f"{self.asked}: what {listing(kinds)} has at {site.path}, {' and '.join(kinds.values())}, does not "
                "change a weight that could be merged into; keep the adapter active instead."
            )
        merged, merged_bias = worked_in(site, plan, _wide(weight), None if bias is None else _wide(bias), self.asked)
        self._stored.append(Stored(site, None if quantised else weight.clone(), None if bias is None else bias.clone()))
        site.write(merged, merged_bias)
        site.merged = self.names

    @torch.no_grad()
    def undo(self) -> None:
        """Put back the stored weights, the last one first: two sites may share a parameter."""
        for stored in reversed(self._stored):
            stored.put_back()
        self.release()

    def release(self) -> None:
        """Forget the stored weights: the model keeps the merged ones."""
        for stored in self._stored:
            if isinstance(stored, Stored):
                stored.site.merged = frozenset()
        self._stored = []


def _wide(values: Tensor) -> Tensor:
    """A copy in single precision at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)


@contextmanager
def _in_single_precision(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the modules compute in single precision at least; after it they have their own tensors again."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    narrow = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    for tensor, data in narrow:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


def _folded(plan: Setup, value: Tensor, leaf: Callable[[str, Tensor], Tensor]) -> Tensor:
    """What a plan makes of a weight or bias, by what each adapter makes of one."""
    if isinstance(plan, Stack):
        for child in plan.children:
            value = _folded(child, value, leaf)
        return value
    if isinstance(plan, Average):
        parts = [
            _folded(child, value, leaf) * weight for child, weight in zip(plan.children, plan.weights, strict=True)
        ]
        return torch.stack(parts).sum(0)
    return value if plan is None else leaf(str(plan), value)


def _check(asked: str, setup: Setup) -> None:
    if not isinstance(setup, Block):
        return
    if not isinstance(setup, (Stack, Average)):
        raise CompositionError(
            f"{asked}: {type(setup).__name__} does not do the same to all tokens, as weights do; only adapters in "
            "Stack and Average can be worked into them. Keep the setup active instead of merging it; at a map of which "
            "only the weight is read nothing else is possible."
        )
    for child in setup.children:
        _check(asked, child)


def worked_in(
    site: Site, plan: Setup, original: Tensor, bias: Tensor | None, asked: str
) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a site with the adapters of `plan` worked in.

    Raises:
        CompositionError: one of its blocks is neither a Stack nor an Average.
    """
    _check(asked, plan)

    def merged(name: str, weight: Tensor) -> Tensor:
        module = site.adapters[name]
        if module.transforms_input and weight is not original:  # beside others it adds its change of the map's own W
            return weight + (module.merged_weight(original) - original)
        return module.merged_weight(weight)

    weight = _folded(plan, original, merged)
    if bias is not None:
        bias = _folded(plan, bias, lambda name, value: site.adapters[name].merged_bias(value))
    return weight, bias
