"""Routing: a gate that mixes adapters, token by token or for whole sequences, for the block ``Route``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..attention import AttentionSite
from ..configuration.base import AdapterConfig
from ..configuration.checks import check_choice, check_integer, check_number
from ..configuration.registry import register_architecture, register_config
from ..context import token_mean
from ..derived import Derived
from ..errors import CompositionError, listing
from ..method import AdapterModule, register, seeded
from ..signals import Signal
from ..sites import LinearSite, Site
from ..sublayers import SublayerSite


@dataclass(eq=False)
class RouterConfig(AdapterConfig):
    """A gate over the adapters ``experts``, for ``Route(*experts, gate=...)``. Shazeer et al. 2017, arXiv:1701.06538.

    ``kind="learned"`` is a linear gate that is trained; ``"arrow"`` needs no training: Ostapenko et al. 2024,
    arXiv:2405.11157. ``level`` is that at which it decides, ``"token"`` or ``"sequence"``. Of the experts the ``top_k``
    with the largest weights count (None: all); ``temperature`` divides the scores.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "router"
    experts: list[str] = field(default_factory=list)
    kind: str = "learned"
    level: str = "token"
    top_k: int | None = None
    temperature: float = 1.0
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "kind", ("learned", "arrow"))
        check_choice(self, "level", ("token", "sequence"))
        check_number(self, "temperature", above=0)
        if self.top_k is not None:
            check_integer(self, "top_k", least=1)


register_architecture("router", RouterConfig)
register_config("router", RouterConfig())


class Gate(AdapterModule[Signal]):
    """p = softmax(top-k(s / T)), s_i = w_i . x, or |v_i . x| for Arrow

    The weights of the experts. v_i is the direction in which expert i changes its input the most, the first right
    singular vector of B A. By itself, outside of ``Route``, a gate changes nothing.

    Sites: where its experts sit. Parameters: weight (n, in) for "learned", none for "arrow". Start: equal weights.
    Merges: no.
    """

    container = "routers"

    def __init__(self, config: RouterConfig, site: Any, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.site, self.stack = config, site, site.stack
        width = site.inputs if isinstance(site, LinearSite) else site.width
        learned = config.kind == "learned"
        with seeded(config.init_weights_seed):
            self.weight = nn.Parameter(torch.zeros(len(config.experts), width)) if learned else None
        self._derived = Derived()

    @classmethod
    def wants(cls, config: RouterConfig, site: Site) -> bool:
        """Where one of the experts sits."""
        return not set(config.experts).isdisjoint(site.adapters)

    def forward(self, signal: Signal) -> Signal:
        """The signal itself."""
        return signal

    def check_experts(self, names: Sequence[str]) -> None:
        """Refuse names that the gate was not made for."""
        if unknown := [name for name in names if name not in self.config.experts]:
            raise CompositionError(
                f"Route(gate={self.name!r}): it was made for the experts {listing(self.config.experts)}, "
                f"{unknown[0]!r} is none of them; add a gate with RouterConfig(experts={list(names)})."
            )

    def mix(self, signal: Signal, children: Sequence[str]) -> list[Tensor]:
        """See the class; of the softmax over the scores of these children only."""
        config, x = self.config, signal.features
        order = [config.experts.index(name) for name in children]
        if self.weight is not None:
            scores = linear(x, self.weight.to(x.dtype)[order])
        else:
            scores = linear(x, self._prototypes().to(x.dtype)[order]).abs()
        if config.level == "sequence":
            scores = token_mean(scores, self.stack, signal)[:, None]
        weights = (scores / config.temperature).softmax(-1)
        if config.top_k is not None and config.top_k < len(order):
            kept = weights.topk(config.top_k, -1)
            weights = torch.zeros_like(weights).scatter(-1, kept.indices, kept.values)
            weights = weights / weights.sum(-1, keepdim=True)
        return list(weights.split(1, -1))  # type: ignore[no-untyped-call]

    def _prototypes(self) -> Tensor:
        """(n, in) the unit vectors v_i; zero for an expert that has no low-rank change here."""
        experts = [self.site.adapters.get(name) for name in self.config.experts]
        parameters = [tensor.detach() for expert in experts if expert is not None for tensor in expert.parameters()]
        return self._derived.get(None, parameters, lambda: torch.stack([self._prototype(expert) for expert in experts]))

    @torch.no_grad()
    def _prototype(self, expert: Any) -> Tensor:
        if expert is None:
            return torch.zeros(self.site.inputs, device=self.site.reference.device)
        weight = torch.zeros(self.site.outputs, self.site.inputs, device=self.site.reference.device)
        directions: Tensor = torch.linalg.svd(expert.merged_weight(weight), full_matrices=False).Vh
        return directions[0]


@register(RouterConfig, LinearSite)
class LinearGate(Gate):
    """A gate over the changes of a linear map."""


@register(RouterConfig, SublayerSite)
class SublayerGate(Gate):
    """A gate over bottleneck adapters."""

    @classmethod
    def wants(cls, config: RouterConfig, site: Site) -> bool:
        """Where one of the experts sits; Arrow knows low-rank changes only."""
        return config.kind == "learned" and super().wants(config, site)


@register(RouterConfig, AttentionSite)
class PrefixGate(SublayerGate):
    """A gate over prefixes: the weight of a query in the attention to each."""
