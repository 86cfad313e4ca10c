"""Invertible adapters: the embeddings are changed on the way in, and the change is undone on the way out."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..method import AdapterModule, activation, register
from ..signals import HiddenSignal
from ..streams import EmbeddingSite
from .bottleneck import BnConfig

CLAMP = 5.0
SLOPE = 0.636
"""2 / pi: the logarithm of a scale is between -CLAMP and CLAMP."""


class Invertible(AdapterModule[HiddenSignal]):
    """A bijection of the embeddings (b, s, e), part of a bottleneck adapter with ``inv_adapter``."""

    container = "invertible_adapters"
    kind: ClassVar[str]

    def __init__(self, config: BnConfig, site: EmbeddingSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.first = site.width // 2
        self.second = site.width - self.first
        self.config = config

    def network(self, inputs: int, outputs: int) -> nn.Sequential:
        """inputs -> inputs / ``inv_adapter_reduction_factor`` -> outputs"""
        inner = max(1, int(inputs // (self.config.inv_adapter_reduction_factor or 1)))
        layers = nn.Sequential(
            nn.Linear(inputs, inner), activation(self.config.non_linearity), nn.Linear(inner, outputs)
        )
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        return layers

    @classmethod
    def wants(cls, config: BnConfig, site: EmbeddingSite) -> bool:
        """If ``inv_adapter`` names this kind."""
        return config.inv_adapter == cls.kind

    def forward(self, signal: HiddenSignal) -> HiddenSignal:
        """There or back, as the signal goes."""
        hidden, own = signal.hidden, next(self.parameters()).dtype
        change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self.back if signal.backwards else self.there
        whole = hidden.to(own)
        changed = torch.cat(change(whole[..., : self.first], whole[..., self.first :]), -1)
        return replace(signal, hidden=changed.to(hidden.dtype))

    @abstractmethod
    def there(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The halves (b, s, e // 2) and (b, s, e - e // 2), changed."""

    @abstractmethod
    def back(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The halves that ``there`` makes these of."""


@register(BnConfig, EmbeddingSite)
class Nice(Invertible):
    """y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1)

    Additive coupling of the halves of the embeddings. Dinh et al. 2015, arXiv:1410.8516, section 3.2; as part of a
    language adapter, with its inverse before the words: Pfeiffer et al. 2020, arXiv:2005.00052, section 3.3.

    Site: EmbeddingSite. Parameters: F.0 (m / f, m), F.2 (l, m / f), G.0 (l / f, l), G.2 (m, l / f), with biases, where
    l = e // 2, m = e - l and f is ``inv_adapter_reduction_factor``. Start: near the identity. Merges: no.
    Differs from 1.x: acts on every architecture and in every block; is undone before static LM heads too.
    """

    kind = "nice"

    def __init__(self, config: BnConfig, site: EmbeddingSite, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.F = self.network(self.second, self.first)
        self.G = self.network(self.first, self.second)

    def there(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        first = first + self.F(second)
        return first, second + self.G(first)

    def back(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """x_2 = y_2 - G(y_1), x_1 = y_1 - F(x_2)"""
        second = second - self.G(first)
        return first - self.F(second), second


@register(BnConfig, EmbeddingSite)
class Glow(Invertible):
    """y_1 = e(s_2) x_1 + t_2 with (s_2, t_2) = S_2(x_2), y_2 = e(s_1) x_2 + t_1 with (s_1, t_1) = S_1(y_1)

    Affine coupling of the halves of the embeddings, e(s) = exp(c (2 / pi) atan(s / c)) with c = 5. Dinh et al. 2017,
    arXiv:1605.08803, eq. 7, without permutations: Kingma and Dhariwal 2018, arXiv:1807.03039, table 1.

    Site: EmbeddingSite. Parameters: s1.0 (l / f, l), s1.2 (2 m, l / f), s2.0 (m / f, m), s2.2 (2 l, m / f), with
    biases; l, m and f as for Nice. Start: near the identity. Merges: no.
    Differs from 1.x: there every forward pass raises.
    """

    kind = "glow"

    def __init__(self, config: BnConfig, site: EmbeddingSite, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.s1 = self.network(self.first, 2 * self.second)
        self.s2 = self.network(self.second, 2 * self.first)

    def there(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        scale, shift = self.s2(second).chunk(2, -1)
        first = first * _exponent(scale).exp() + shift
        scale, shift = self.s1(first).chunk(2, -1)
        return first, second * _exponent(scale).exp() + shift

    def back(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """x_2 = (y_2 - t_1) / e(s_1), x_1 = (y_1 - t_2) / e(s_2)"""
        scale, shift = self.s1(first).chunk(2, -1)
        second = (second - shift) * _exponent(-scale).exp()
        scale, shift = self.s2(second).chunk(2, -1)
        return (first - shift) * _exponent(-scale).exp(), second


def _exponent(scale: Tensor) -> Tensor:
    return CLAMP * SLOPE * torch.atan(scale / CLAMP)
