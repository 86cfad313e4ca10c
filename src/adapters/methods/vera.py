"""VeRA: a low-rank change whose random matrices are shared and whose scaling vectors are learned."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..configuration.registry import register_config, register_preset
from ..grouping import Group
from ..method import register
from ..signals import LinearSignal
from ..sites import LinearSite
from .lora import LoRAConfig, LowRankChange
from .lora_init import initialise

WIDE = 2**15
"""With more numbers than these in A and B, to copy them for each row is slower than a call for each adapter."""


@dataclass(eq=False)
class VeraConfig(LoRAConfig):
    """Learned vectors between shared random matrices. Kopiczko et al. 2024, arXiv:2310.11454.

    ``vera_d`` and ``vera_b`` are the start values of the two vectors; the model starts unchanged if ``vera_b`` is 0.
    """

    init_weights: str = "vera"
    vera_d: float | None = 0.1
    vera_b: float | None = 0.0


register_preset(VeraConfig, LoRAConfig, lambda config: config.variant == "vera")
register_config("vera", VeraConfig())


class RandomProjections(nn.Module):
    """A (r, in) and B (out, r) for the widest map of an adapter; they are drawn once and not trained."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, config: LoRAConfig, sites: Sequence[LinearSite]) -> None:
        super().__init__()
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        shapes = {
            "lora_A": (config.r, max(site.inputs for site in sites)),
            "lora_B": (max(site.outputs for site in sites), config.r),
        }
        for name, shape in shapes.items():
            matrix = torch.empty(shape, dtype=dtype)
            initialise(matrix, config.init_weights, zero=False)  # B is not trained: at 0 it would switch VeRA off
            self.register_buffer(name, matrix)


@register(LoRAConfig, LinearSite)
class VeRA(LowRankChange):
    """y = Wx + (alpha / r) b * B (d * A x)

    Learned vectors around random matrices that all maps share; a narrower map uses their first columns and rows.
    Kopiczko et al. 2024, arXiv:2310.11454, eq. 2. With ``use_gating`` the change is multiplied by a gate.

    Site: LinearSite. Parameters: vera_D = d (r,), vera_B = b (out,), gate (1, in); shared and not trained: lora_A
    (r, in), lora_B (out, r).
    Start: identity (``vera_b`` = 0). Merges: yes, unless gated.
    Differs from 1.x: d and b are vectors (there: full matrices, which files of 1.x keep); maps of any shapes.
    """

    variant = "vera"

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: Any = None) -> None:
        super().__init__(config, site, shared)
        self._shared = (shared,)  # in a tuple, so that it is not registered at every map
        self.inputs, self.outputs = site.inputs, site.outputs
        inner = torch.full((config.r,), 0.1 if config.vera_d is None else config.vera_d, dtype=self.dtype)
        outer = torch.full((site.outputs,), 0.0 if config.vera_b is None else config.vera_b, dtype=self.dtype)
        self.vera_D = nn.Parameter(inner.diag() if config.legacy else inner)
        self.vera_B = nn.Parameter(outer.diag() if config.legacy else outer)

    @classmethod
    def share(cls, config: LoRAConfig, sites: Sequence[LinearSite]) -> nn.Module:
        """The random matrices."""
        return RandomProjections(config, sites)

    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): views of what all maps share."""
        shared = self._shared[0]
        return shared.lora_A[:, : self.inputs], shared.lora_B[: self.outputs]

    def factors(self) -> tuple[Tensor, Tensor]:
        """d * A and b * B."""
        down, up = self.projections()
        if self.config.legacy:
            return self.vera_D @ down, self.vera_B @ up
        return self.vera_D[:, None] * down, self.vera_B[:, None] * up

    def sources(self) -> list[Tensor]:
        """See the base."""
        return [*super().sources(), *self._shared[0]._buffers.values()]

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        if self.config.legacy:
            return super().forward(signal)
        down, up = self.projections()
        low = linear(self.dropped(signal.x, down.dtype), down) * (self.vera_D * self.scale)
        gate = self.opened(signal)
        change = linear(low if gate is None else low * gate[:, None], up)
        if change.dtype != signal.output.dtype:
            output = signal.output + (change * self.vera_B).to(signal.output.dtype)
        elif signal.owned and not torch.compiler.is_compiling():
            signal.output.addcmul_(change, self.vera_B)
            return signal
        else:
            output = torch.addcmul(signal.output, change, self.vera_B)
        return signal.giving(output)

    def group_key(self) -> Hashable:
        """Without gate, of one rank, and small; not those of files of 1.x."""
        wide = self.rank * (self.inputs + self.outputs) > WIDE
        alone = wide or self.gate is not None or self.config.legacy
        return None if alone else (self.rank, self.vera_D.dtype, self.config.dropout)

    @classmethod
    def stacked_factors(cls, group: Group) -> tuple[Tensor, Tensor]:
        """Of all modules. They are not kept: the random matrices shall be in memory once, not once for each map."""
        modules: list[Any] = group.modules
        downs, ups = zip(*(module.projections() for module in modules), strict=True)
        inner, outer = group.stacked("vera_D"), group.stacked("vera_B")
        return inner[:, :, None] * torch.stack(downs), outer[:, :, None] * torch.stack(ups)
