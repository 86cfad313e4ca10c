"""Prefix tuning: learned keys and values in front of those of an attention."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..attention import AttentionSite
from ..configuration.base import LATER, AdapterConfig
from ..configuration.checks import check_activation, check_fraction, check_integer, check_layers
from ..configuration.registry import register_architecture, register_config
from ..context import token_mean
from ..derived import Derived
from ..errors import AdapterError
from ..grouping import Group, per_row
from ..method import AdapterModule, activation, register, seeded
from ..positions import PositionSignal, PositionSite
from ..signals import PrefixSignal


@dataclass(eq=False)
class PrefixTuningConfig(AdapterConfig):
    """Learned keys and values in front of those of every attention. Li and Liang 2021, arXiv:2101.00190.

    The prefix of a decoder's self-attention is always there; ``encoder_prefix`` and ``cross_prefix`` add those of an
    encoder-decoder's encoder and of its cross attention. The prefix comes from a two-layer network of width
    ``bottleneck_size`` with ``non_linearity`` in between, or (``flat``) is a parameter of its own.
    ``shift_positions`` counts it as positions, as if it were tokens: those of the input begin with ``prefix_length``.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "prefix_tuning"
    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: list[int] = field(default_factory=list)
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None
    shift_positions: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "leave_out")
        check_integer(self, "prefix_length", least=1)
        check_integer(self, "bottleneck_size", least=1)
        check_activation(self, "non_linearity")
        check_fraction(self, "dropout")


register_architecture("prefix_tuning", PrefixTuningConfig)
register_config("prefix_tuning", PrefixTuningConfig())
register_config("prefix_tuning_flat", PrefixTuningConfig(flat=True))


class PrefixGroup(nn.Module):
    """The prefixes of all layers of one kind of attention: P = L2 act(L1 E), or a parameter if ``flat``.

    Viewed as (p, n, size), the i-th of n slots holds the keys and the values (heads, width) of the i-th layer.
    Each layer computes its own slice only, so that no layer depends on what another one has computed.
    """

    def __init__(self, config: PrefixTuningConfig, sites: Sequence[AttentionSite]) -> None:
        super().__init__()
        site = sites[0]
        self.length, self.layers = config.prefix_length, len(sites)
        self.shape = site.shape
        self.positions = {member.index: position for position, member in enumerate(sites)}
        self._kept = Derived()
        size = len(sites) * self.size
        self.control_trans: nn.Sequential | nn.Parameter
        with seeded(config.init_weights_seed):
            if config.flat:
                self.control_trans = nn.Parameter(torch.randn(config.prefix_length * size))
                return
            self.wte = nn.Embedding(config.prefix_length, site.width)
            self.control_trans = nn.Sequential(
                nn.Linear(site.width, config.bottleneck_size),
                activation(config.non_linearity),
                nn.Linear(config.bottleneck_size, size),
            )

    @property
    def size(self) -> int:
        """How many numbers the keys and values of one position of one layer are."""
        return self.shape.heads * (self.shape.key_width + self.shape.value_width)

    def layer(self, index: int) -> Tensor:
        """(p, size) the keys and values of the `index`-th layer."""
        return self._kept.get(index, self._sources(), lambda: self._compute(index))

    def parted(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (…, heads, p, key width) and values (…, heads, p, value width) out of (…, p, size)."""
        heads = self.shape.heads
        parts = torch.split(states, [heads * self.shape.key_width, heads * self.shape.value_width], -1)
        key, value = (part.view(*part.shape[:-1], heads, -1).transpose(-2, -3) for part in parts)
        return key, value

    def _sources(self) -> list[Any]:
        """The parameters; ``parameters()`` walks through all modules, at every layer of every pass."""
        if isinstance(self.control_trans, nn.Parameter):
            return [self.control_trans]
        inner, _, outer = self.control_trans
        return [self.wte.weight, inner.weight, inner.bias, outer.weight, outer.bias]

    @torch.no_grad()
    def flat(self) -> Tensor:
        """The prefixes of all layers as one vector."""
        if isinstance(self.control_trans, nn.Parameter):
            return self.control_trans.detach()
        made: Tensor = self.control_trans(self.wte.weight)
        return made.flatten()

    @torch.no_grad()
    def eject(self) -> None:
        """Make the prefixes themselves the parameter, in the place of what they are computed from."""
        if isinstance(self.control_trans, nn.Parameter):
            return
        flat = self.flat()
        trained = self.wte.weight.requires_grad
        del self.wte, self.control_trans
        self.control_trans = nn.Parameter(flat, requires_grad=trained)

    def _compute(self, index: int) -> Tensor:
        if isinstance(self.control_trans, nn.Parameter):
            return self.control_trans.view(self.length, self.layers, -1)[:, index]
        inner = self.control_trans[:2](self.wte.weight)
        weight, bias = (self.control_trans[2].get_parameter(name) for name in ("weight", "bias"))
        rows = slice(index * self.size, (index + 1) * self.size)
        return linear(inner, weight[rows], bias[rows])


@register(PrefixTuningConfig, AttentionSite)
class Prefix(AdapterModule[PrefixSignal]):
    """softmax(q [P_k; K]^T / sqrt(w)) [P_v; V]

    Learned keys and values in front of an attention's own; they have no position and every query sees them. Li and
    Liang 2021, arXiv:2101.00190, section 4.2 and eq. 3. With ``use_gating`` the prefix is multiplied by a gate, one for
    each row: Mao et al. 2022, arXiv:2110.07577.

    Site: AttentionSite. Parameters, shared by all layers: wte (p, d), control_trans; in each layer
    the gate's weight (1 or 2, d) and bias.
    Start: random, not the identity. Merges: no.
    Differs from 1.x: acts in every attention implementation, with and without a mask or a cache.
    """

    container = "prefix_gates"
    shared_container = "prefix_tuning.prefix_tunings"

    def __init__(self, config: PrefixTuningConfig, site: AttentionSite, shared: Any = None) -> None:
        super().__init__()
        group = next(group for group in shared.values() if site.index in group.positions)
        self._group = (group,)  # in a tuple, so that it is not registered in every layer
        self.index = group.positions[site.index]
        self.stack, self.dropout = site.stack, config.dropout
        gates = 1 if config.shared_gating else 2
        self.weight = nn.Parameter(torch.empty(gates, site.width)) if config.use_gating else None
        self.bias = nn.Parameter(torch.zeros(gates)) if config.use_gating else None
        with seeded(config.init_weights_seed):
            if self.weight is not None:
                nn.init.normal_(self.weight, std=0.02)

    @classmethod
    def wants(cls, config: PrefixTuningConfig, site: AttentionSite) -> bool:
        """At every attention but those of an encoder or across, where the configuration says no."""
        switched = {"encoder_prefix": config.encoder_prefix, "cross_prefix": config.cross_prefix}
        return switched.get(site.location, True) and site.layer not in config.leave_out

    @classmethod
    def share(cls, config: PrefixTuningConfig, sites: Sequence[AttentionSite]) -> nn.ModuleDict:
        """One group of prefixes for each kind of attention, and for each shape that attentions of a kind have."""
        kinds: dict[str, dict[tuple[int, ...], list[AttentionSite]]] = {}
        for site in sites:
            site.require_way_in()
            shape = (site.shape.heads, site.shape.key_width, site.shape.value_width, site.width)
            kinds.setdefault(site.location, {}).setdefault(shape, []).append(site)
        return nn.ModuleDict(
            {
                f"{kind}_{number}" if number else kind: PrefixGroup(config, members)
                for kind, shapes in kinds.items()
                for number, members in enumerate(shapes.values())
            }
        )

    def group_key(self) -> Hashable:
        """Of one length and without a gate."""
        group = self._group[0]
        return None if self.weight is not None else (group.length, group.shape, self.dropout)

    @classmethod
    def grouped(cls, group: Group, signal: PrefixSignal, index: Tensor | None) -> PrefixSignal:
        """See the class."""
        modules: list[Any] = group.modules
        states = torch.stack([module._group[0].layer(module.index) for module in modules])  # (n, p, size)
        states = dropout(states, modules[0].dropout, modules[0].training)
        states = per_row(states, index, len(signal)).to(signal.key.dtype)
        return signal.with_prefix(*modules[0]._group[0].parted(states))

    def forward(self, signal: PrefixSignal) -> PrefixSignal:
        """See the class."""
        states = self._group[0].layer(self.index)
        states = dropout(states, self.dropout, self.training) if self.dropout else states
        states = states.expand(signal.key.shape[0], -1, -1).to(signal.key.dtype)
        key, value = self._group[0].parted(states)
        if self.weight is not None:
            gate = token_mean(torch.sigmoid(linear(signal.hidden, self.weight, self.bias)), self.stack, signal)
            self.report_gate(gate, signal)
            key, value = (part * gate[:, index, None, None, None] for part, index in ((key, 0), (value, -1)))
        return signal.with_prefix(key, value)


@register(PrefixTuningConfig, PositionSite)
class PositionShift(AdapterModule[PositionSignal]):
    """Positions begin with p, the length of the prefix: see ``shift_positions``. No parameters.

    In a ``Stack`` lengths add up, as those of the prefixes do.
    """

    container = "position_shifts"

    def __init__(self, config: PrefixTuningConfig, site: PositionSite, shared: Any = None) -> None:
        super().__init__()
        self.length = config.prefix_length

    @classmethod
    def wants(cls, config: PrefixTuningConfig, site: PositionSite) -> bool:
        """If the configuration asks for it."""
        return config.shift_positions

    @classmethod
    def asks_for(cls, config: PrefixTuningConfig) -> set[str]:
        """Positions, in that case."""
        return {"positions"} if config.shift_positions else set()

    def forward(self, signal: PositionSignal) -> PositionSignal:
        """See the class."""
        return replace(signal, shift=signal.shift + self.length)


def eject(name: str, modules: Iterable[nn.Module]) -> None:
    """Make the prefixes among an adapter's modules flat.

    Raises:
        AdapterError: there are none.
    """
    groups = [part for module in modules for part in module.modules() if isinstance(part, PrefixGroup)]
    if not groups:
        raise AdapterError(f"eject_prefix_tuning({name!r}): the adapter has no prefix; give one of prefix tuning.")
    for group in groups:
        group.eject()
