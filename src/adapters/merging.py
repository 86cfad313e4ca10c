"""Working an adapter into the weights of the model, and putting back what was there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError
from .method import AdapterModule
from .sites import Site


@dataclass(frozen=True)
class Stored:
    """What a site's host held before the merge; None where it has no such parameter."""

    site: Site
    weight: Tensor
    bias: Tensor | None


class Merge:
    """An adapter that is worked into the weights of its sites, with the weights as they were.

    A module says what becomes of its site's weight and bias by ``merged_weight`` and ``merged_bias``; a site says what
    it has of them by ``weight`` and ``bias``, which may be views of a part of a parameter. Such sites skip the adapter.
    """

    def __init__(self, name: str, holding: Iterable[tuple[Site, AdapterModule[Any]]]) -> None:
        """Merge; if one module cannot be merged, none is.

        Raises:
            AdapterError: a module cannot be merged, or the weights are quantised.
        """
        self.name = name
        self._stored: list[Stored] = []
        try:
            for site, module in holding:
                self._merge(site, module)
        except BaseException:
            self.undo()
            raise

    @torch.no_grad()
    def _merge(self, site: Site, module: AdapterModule[Any]) -> None:
        weight, bias = site.weight, site.bias
        if weight is None:
            raise AdapterError(
                f"merge_adapter({self.name!r}): {type(module).__name__} at {site.path} does not change a weight; keep "
                "the adapter active instead."
            )
        if not weight.is_floating_point():
            raise AdapterError(
                f"merge_adapter({self.name!r}): the weight of {site.host_path} is of {weight.dtype}; only floating "
                "weights can be merged. Keep the adapter active instead."
            )
        stored = Stored(site, weight.clone(), None if bias is None else bias.clone())
        merged = module.merged_weight(stored.weight)
        merged_bias = None if stored.bias is None else module.merged_bias(stored.bias)
        self._stored.append(stored)
        weight.copy_(merged)
        if bias is not None and merged_bias is not None:
            bias.copy_(merged_bias)
        site.merged = self.name

    @torch.no_grad()
    def undo(self) -> None:
        """Put back the stored weights, the last one first: two sites may share a parameter."""
        for stored in reversed(self._stored):
            for now, before in ((stored.site.weight, stored.weight), (stored.site.bias, stored.bias)):
                if now is not None and before is not None:
                    now.copy_(before)
        self.release()

    def release(self) -> None:
        """Forget the stored weights: the model keeps the merged ones."""
        for stored in self._stored:
            stored.site.merged = None
        self._stored = []
