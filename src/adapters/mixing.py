"""Weighted sums of tensors, after some of their values were dropped and those of the minority's sign left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Σ w t, with the values of each t that `drops` leaves, and where it `elects` those of one sign.

    drops: "smallest" keeps the share `density` of the values, the largest ones; "random" keeps each with that
    probability and divides it by it (DARE, Yu et al. 2023, arXiv:2311.03099); "" keeps all.
    elects: of each entry only the values of the sign that has the larger sum (``by_count``: that more of them have),
    and their mean in place of the sum (TIES, Yadav et al. 2023, arXiv:2306.01708).
    """

    drops: str = ""
    elects: bool = False
    density: float = 1.0
    by_count: bool = False

    def of(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The mix of tensors of one shape, in single precision at least."""
        wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
        kept = torch.stack([self._kept(tensor) for tensor in wide])
        weighted = kept * kept.new_tensor(weights).view(-1, *[1] * (kept.dim() - 1))
        if not self.elects:
            return weighted.sum(0)
        elected = torch.where((kept.sign() if self.by_count else kept).sum(0) >= 0, 1, -1)
        of_them = kept.sign() == elected
        return (weighted * of_them).sum(0) / of_them.sum(0).clamp(min=1)

    def _kept(self, tensor: Tensor) -> Tensor:
        if not self.drops or self.density >= 1:
            return tensor
        if self.drops == "random":
            return tensor * torch.bernoulli(torch.full_like(tensor, self.density)) / self.density
        largest = tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices
        kept = torch.zeros_like(tensor).flatten()
        kept[largest] = tensor.flatten()[largest]
        return kept.view_as(tensor)


MIXINGS = {
    "linear": Mixing(),
    "magnitude_prune": Mixing("smallest"),
    "ties": Mixing("smallest", elects=True),
    "dare_linear": Mixing("random"),
    "dare_ties": Mixing("random", elects=True),
}
