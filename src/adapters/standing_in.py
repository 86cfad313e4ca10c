"""Computing a linear map with another weight: one product with W + ΔW in place of Wx and ΔW x.

A hook comes too late to save the product with W, so the host's forward is replaced while such adapters sit there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .composition import Setup

if TYPE_CHECKING:
    from .sites import LinearSite

FORWARD = "forward"
EXACT = (torch.float32, torch.float64)
"""In these a small change of a weight survives its addition to the weight."""


class StandIn:
    """Stands in for the forward of a site's host, if that is plain and nobody else does."""

    def __init__(self, site: LinearSite) -> None:
        self.site = site

    def attach(self) -> None:
        """Take the forward's place."""
        host = self.site.host
        if type(host) is nn.Linear:
            vars(host).setdefault(FORWARD, self.forward)

    def detach(self) -> None:
        """Give it back."""
        if self._is_there:
            del vars(self.site.host)[FORWARD]

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
