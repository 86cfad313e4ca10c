"""DoRA and DvoRA: a linear map's direction changed by LoRA or VeRA, its magnitude by a learned vector."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..configuration.registry import register_config, register_preset
from ..derived import Derived
from ..grouping import Group, per_row
from ..method import register
from ..signals import LinearSignal
from ..sites import LinearSite
from .lora import LoRA, LoRAConfig, LowRankChange
from .vera import VeRA


@dataclass(eq=False)
class DoRAConfig(LoRAConfig):
    """Magnitude and direction of a linear map, changed apart. Liu et al. 2024, arXiv:2402.09353."""

    use_dora: bool = True


@dataclass(eq=False)
class DvoRAConfig(DoRAConfig):
    """DoRA with the shared random matrices of VeRA. Liu et al. 2024, arXiv:2402.09353."""

    init_weights: str = "vera"
    vera_d: float | None = 0.1
    vera_b: float | None = 0.0


register_preset(DoRAConfig, LoRAConfig, lambda config: config.variant == "dora")
register_preset(DvoRAConfig, LoRAConfig, lambda config: config.variant == "dvora")
register_config("dora", DoRAConfig())
register_config("dvora", DvoRAConfig())


class Magnitude(LowRankChange):
    """y = b + g * (y' - b), where y' is what the low-rank change makes of Wx + b, and g = m / ||W + ΔW|| row by row.

    The norm is a constant for the gradient (section 4.3 of the paper). It is found without ΔW, from products of rank
    r: ||W + s B A||² = ||W||² + 2 s B (W Aᵀ) + s² B (A Aᵀ) Bᵀ, diagonals alone.
    With ``legacy`` it is that of 1.x: of W + B A, and the bias is multiplied by g too.
    """

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: Any = None) -> None:
        super().__init__(config, site, shared)
        self.site = site
        self.m = nn.Linear(1, site.outputs, bias=False)
        norms = squared_norms(site.weight).sqrt().to(self.dtype or site.weight.dtype)
        self.m.weight = nn.Parameter(norms[:, None])
        self._magnitudes = Derived()

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        changed = super().forward(signal)
        known = [self.site.stored, self.m.weight, *self.sources()]
        if self.site.bias is not None:
            known.append(self.site.bias)
        gain, shift = self._magnitudes.get("gain", known, self.gain)
        output = changed.output
        gain = gain.to(output.dtype)
        moved = output * gain if shift is None else torch.addcmul(shift.to(output.dtype), output, gain)
        return replace(changed, output=moved)

    def gain(self) -> tuple[Tensor, Tensor | None]:
        """g (out,) and (1 - g) b."""
        with torch.no_grad():
            known = [self.site.stored, *self.sources()]
            norms = self._magnitudes.get("norms", known, self.norms)
        return self._gain(self.m.weight[:, 0], norms)

    def _gain(self, magnitude: Tensor, norms: Tensor) -> tuple[Tensor, Tensor | None]:
        gain, bias = magnitude / norms.to(magnitude.dtype), self.site.bias
        return gain, None if bias is None or self.config.legacy else bias - gain * bias

    @property
    def norm_scale(self) -> float:
        """s in the norm."""
        return 1.0 if self.config.legacy else self.scale

    def norms(self) -> Tensor:
        """||W + ΔW|| (out,), in single precision at least."""
        return self._norms(*self.factors(), self.norm_scale)

    def _norms(self, down: Tensor, up: Tensor, scale: float | Tensor) -> Tensor:
        """||W + s up down|| (..., out) for down (..., r, in) and up (..., out, r)."""
        weight = self.site.weight
        square = self._magnitudes.get("square", [self.site.stored], lambda: squared_norms(weight))
        crossed, up = linear(down.to(weight.dtype), weight).mT.to(square.dtype), up.to(square.dtype)
        own = up @ (down @ down.mT).to(square.dtype)
        square = square + (up * (2 * scale * crossed + scale**2 * own)).sum(-1)
        return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()

    def group_key(self) -> Hashable:
        """As the low-rank change, and all or none of 1.x."""
        key = super().group_key()
        return None if key is None else (key, self.config.legacy)

    @classmethod
    def grouped(cls, group: Group, signal: LinearSignal, index: Tensor | None) -> LinearSignal:
        """See the class."""
        modules: list[Any] = group.modules
        first, output = modules[0], super().grouped(group, signal, index).output
        with torch.no_grad():
            known = [first.site.stored, *(source for module in modules for source in module.sources())]
            norms = group.derived.get("norms", known, lambda: cls._grouped_norms(group))
        gains, shifts = first._gain(group.stacked("m.weight")[..., 0], norms)
        gain = per_row(gains, index, len(signal))[:, None].to(output.dtype)
        if shifts is None:
            return signal.giving(output * gain)
        shift = per_row(shifts, index, len(signal))[:, None].to(output.dtype)
        return signal.giving(torch.addcmul(shift, output, gain))

    @classmethod
    def _grouped_norms(cls, group: Group) -> Tensor:
        modules: list[Any] = group.modules
        down, up = cls.stacked_factors(group)
        scales = torch.tensor([module.norm_scale for module in modules], dtype=up.dtype, device=up.device)
        norms: Tensor = modules[0]._norms(down, up, scales[:, None, None])
        return norms

    def merged_weight(self, weight: Tensor) -> Tensor:
        """g times the rows of W + ΔW."""
        return super().merged_weight(weight) * self.gain()[0][:, None].to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """b of the map; what others add to it is multiplied by g, and with ``legacy`` all of it."""
        gain, own = self.gain()[0].to(bias.dtype), self.site.bias
        return bias * gain if self.config.legacy or own is None else own + gain * (bias - own)


def squared_norms(weight: Tensor) -> Tensor:
    """||W||² (out,) of the rows of W (out, in), in single precision at least."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return wide.square().sum(1)


@register(LoRAConfig, LinearSite)
class DoRA(Magnitude, LoRA):
    """y = m / ||W + (alpha / r) B A|| * (W + (alpha / r) B A) x + b, the norms row by row

    The rows' directions are changed by LoRA, their lengths are learned. Liu et al. 2024, arXiv:2402.09353, eq. 5.

    Site: LinearSite. Parameters: those of LoRA, m.weight (out, 1).
    Start: identity (lora_B = 0, m = ||W||). Merges: yes, unless gated.
    Differs from 1.x: the norm is that of the scaled change and the bias stays, so merged = unmerged; the norm has no
    gradient; fused projections. Files of 1.x compute what they did (``legacy``).
    """

    variant = "dora"


@register(LoRAConfig, LinearSite)
class DvoRA(Magnitude, VeRA):
    """y = m / ||W + ΔW|| * (W + ΔW) x + b, where ΔW = (alpha / r) b * B (d * A) is VeRA's

    DoRA with the shared random matrices of VeRA. Liu et al. 2024, arXiv:2402.09353, section 5.5.

    Site: LinearSite. Parameters: those of VeRA, m.weight (out, 1).
    Start: identity (``vera_b`` = 0, m = ||W||). Merges: yes, unless gated.
    """

    variant = "dvora"
