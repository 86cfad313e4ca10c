"""Bottleneck adapters: a small network after a sub-layer."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.base import AdapterConfig
from ..configuration.checks import (
    check_activation,
    check_choice,
    check_fraction,
    check_integer,
    check_layers,
    check_number,
    is_number,
)
from ..configuration.registry import register_architecture, register_config
from ..context import token_mean
from ..errors import AdapterError
from ..grouping import Group, grouped_linear, per_row
from ..method import AdapterModule, activation, register, seeded
from ..signals import SublayerSignal
from ..sublayers import SublayerSite
from .hypercomplex import SharedByLayers, projection

INITIALISATIONS = ("bert", "mam_adapter", "houlsby")
Change = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class BnConfig(AdapterConfig):
    """The bottleneck adapter with every choice left open. Houlsby et al. 2019, arXiv:1902.00751.

    The width of the bottleneck is the model's divided by ``reduction_factor``, at least 1. A mapping gives each layer
    its own: ``{"default": 16, "0": 8}``. ``scaling`` is a number, ``"learned"`` (one scalar) or ``"channel"`` (a
    vector). ``original_ln_before`` and ``original_ln_after`` apply the residual and the norm of the block before and
    after the adapter; ``ln_before`` and ``ln_after`` add norms of the adapter's own. ``residual_before_ln`` takes the
    adapter's residual before (True) or after (False) the block's norm, or in between (``"post_add"``).
    ``inv_adapter`` adds an invertible adapter to the embeddings. The fields from ``phm_layer`` to ``phm_bias`` are
    those of Compacter.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | Mapping[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: list[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    phm_rank: int = 1
    phm_bias: bool = True
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reduction()
        check_activation(self, "non_linearity")
        check_choice(self, "init_weights", INITIALISATIONS)
        if is_number(self.scaling):
            self.normalize("scaling", float(self.scaling))
        elif self.scaling not in ("learned", "channel"):
            raise self.refusal("scaling", "unknown", "it must be a number, 'learned' or 'channel'")
        self._check_residual()
        self._check_invertible()
        check_layers(self, "leave_out")
        check_fraction(self, "dropout")
        if self["stochastic_depth"] is None:
            self.normalize("stochastic_depth", 0.0)
        check_fraction(self, "stochastic_depth")
        check_integer(self, "phm_dim", least=1)
        check_integer(self, "phm_rank", least=1)
        check_number(self, "phm_init_range", above=0)
        check_choice(self, "phm_c_init", ("normal", "uniform"))
        check_choice(self, "hypercomplex_nonlinearity", ("phm", "glorot-normal", "glorot-uniform", "normal"))

    def _check_reduction(self) -> None:
        if not isinstance(self.reduction_factor, Mapping):
            check_number(self, "reduction_factor", above=0)
            return
        factors = {str(layer): factor for layer, factor in self.reduction_factor.items()}
        known = all(layer == "default" or layer.isdecimal() for layer in factors)
        positive = all(is_number(factor) and factor > 0 for factor in factors.values())
        if not (known and positive and len(factors) == len(self.reduction_factor) > 0):
            right = "it must give a number > 0 for each layer ('0', '1', ...) or for 'default'"
            raise self.refusal("reduction_factor", "no mapping of layers to factors", right)
        self.normalize("reduction_factor", factors)

    def _check_residual(self) -> None:
        if not isinstance(self.residual_before_ln, bool) and self.residual_before_ln != "post_add":
            raise self.refusal("residual_before_ln", "unknown", "it must be True, False or 'post_add'")
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            wrong = "the state between the block's residual and its norm"
            raise self.refusal("residual_before_ln", wrong, "it needs original_ln_before=True")

    def _check_invertible(self) -> None:
        check_choice(self, "inv_adapter", ("nice", "glow", None))
        if self.inv_adapter is not None or self.inv_adapter_reduction_factor is not None:
            check_number(self, "inv_adapter_reduction_factor", above=0)


@dataclass(eq=False)
class SeqBnConfig(BnConfig):
    """A bottleneck after the feed-forward block. Pfeiffer et al. 2020, arXiv:2005.00052."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = True


@dataclass(eq=False)
class SeqBnInvConfig(SeqBnConfig):
    """SeqBnConfig with an invertible adapter (NICE) on the embeddings, as MAD-X has. arXiv:2005.00052."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass(eq=False)
class DoubleSeqBnConfig(BnConfig):
    """Bottlenecks after the attention and after the feed-forward block. Houlsby et al. 2019, arXiv:1902.00751."""

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "swish"


@dataclass(eq=False)
class DoubleSeqBnInvConfig(DoubleSeqBnConfig):
    """DoubleSeqBnConfig with an invertible adapter (NICE) on the embeddings."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass(eq=False)
class ParBnConfig(BnConfig):
    """A bottleneck in parallel to the feed-forward block. He et al. 2021, arXiv:2110.04366."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 2
    non_linearity: str = "relu"
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | str = 4.0


@dataclass(eq=False)
class AdapterPlusConfig(BnConfig):
    """Adapter+: a bottleneck after the block's norm, scaled by channel. Steitz and Roth 2024, arXiv:2406.06820."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 96
    non_linearity: str = "gelu"
    original_ln_before: bool = True
    original_ln_after: bool = False
    residual_before_ln: bool | str = False
    stochastic_depth: float = 0.1
    init_weights: str = "houlsby"
    scaling: float | str = "channel"


register_architecture(None, BnConfig)
register_architecture("bottleneck", BnConfig)
register_config("seq_bn", SeqBnConfig(), "pfeiffer")
register_config("double_seq_bn", DoubleSeqBnConfig(), "houlsby")
register_config("seq_bn_inv", SeqBnInvConfig(), "pfeiffer+inv")
register_config("double_seq_bn_inv", DoubleSeqBnInvConfig(), "houlsby+inv")
register_config("par_bn", ParBnConfig(), "parallel")
register_config("scaled_par_bn", ParBnConfig(scaling="learned"), "scaled_parallel")
register_config("adapter_plus", AdapterPlusConfig())


@register(BnConfig, SublayerSite)
class Bottleneck(AdapterModule[SublayerSignal]):
    """h' = U act(D x) + residual

    A two-layer network of a smaller width after a sub-layer, with a residual of its own. Houlsby et al. 2019,
    arXiv:1902.00751, figure 2; in parallel to the sub-layer (x = r): He et al. 2021, arXiv:2110.04366, table 1.

    Site: SublayerSite. Parameters: adapter_down (w, d), adapter_up (d, w), and as configured scaling (1,) or (d,),
    gate (1, d), the norms. Start: near the identity for "bert", the identity for "mam_adapter". Merges: no.
    """

    container = "adapters"

    def __init__(self, config: BnConfig, site: SublayerSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        width = site.width
        self.stack, self.normalised, self.config = site.stack, site.normalised, config
        inner = _inner_width(config, site)
        before: list[nn.Module] = [nn.LayerNorm(width)] if config.ln_before else []
        down = projection(config, width, inner, "down", shared)
        self.adapter_down = nn.Sequential(*before, down, activation(config.non_linearity))
        self.adapter_up: Any = projection(config, inner, width, "up", shared)
        self.adapter_norm_after = nn.LayerNorm(width) if config.ln_after else None
        self.scaling: float | nn.Parameter
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if config.scaling == "learned" else width))
        else:
            self.scaling = config.scaling
        self.gate = nn.Linear(width, 1) if config.use_gating else None
        with seeded(config.init_weights_seed):
            self._initialise(down)

    @classmethod
    def wants(cls, config: BnConfig, site: SublayerSite) -> bool:
        """At the sub-layers that the configuration's location flags name."""
        return bool(config[site.location]) and site.layer not in config.leave_out

    @classmethod
    def asks_for(cls, config: BnConfig) -> set[str]:
        """The location flags that are set."""
        return {location for location in SublayerSite.locations.values() if config[location]}

    @classmethod
    def share(cls, config: BnConfig, sites: Sequence[SublayerSite]) -> nn.Module | None:
        """For Compacter the rule and W, as configured."""
        if not config.phm_layer or not (config.shared_phm_rule or config.shared_W_phm):
            return None
        return SharedByLayers(config, [(site.width, _inner_width(config, site)) for site in sites])

    def _initialise(self, down: nn.Module) -> None:
        """The hypercomplex ones initialise themselves."""
        gates = [self.gate] if self.gate is not None else []
        dense = [linear for linear in (down, self.adapter_up) if isinstance(linear, nn.Linear)]
        for linear in dense:
            nn.init.zeros_(linear.bias)
        match self.config.init_weights:
            case "bert":
                _normal(*dense, *gates)
            case "mam_adapter":  # torch makes linear maps kaiming-uniform with a = sqrt(5), as D shall be
                for up in dense[1:]:
                    nn.init.zeros_(up.weight)
                _normal(*gates)
            case _:
                for linear in dense:
                    nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, signal: SublayerSignal) -> SublayerSignal:
        """See the class; for each flag see ``BnConfig``."""
        return self.finish(signal, *self.prepare(signal), self.change, self.scaling)

    @property
    def is_plain(self) -> bool:
        """Whether what it adds is s (U act(D x) + b) and nothing else, at this moment."""
        drops_rows = self.training and self.config.stochastic_depth
        plain = type(self.adapter_up) is nn.Linear and not drops_rows and self.gate is None
        return plain and not self.config.ln_before

    @property
    def preparation(self) -> Hashable:
        """Bottlenecks with equal ones make the same x and residual of a signal; so do their activations."""
        config = self.config
        return config.is_parallel, config.original_ln_before, config.residual_before_ln, config.non_linearity

    @property
    def down(self) -> tuple[Tensor, Tensor]:
        """D and its bias."""
        linear: Any = self.adapter_down[-2]
        return linear.weight, linear.bias

    @property
    def up(self) -> tuple[Tensor, Tensor]:
        """s U and s b: what follows the activation, scaled."""
        up, scale = self.adapter_up, self.scaling
        if not isinstance(scale, nn.Parameter):
            return (up.weight, up.bias) if scale == 1.0 else (up.weight * scale, up.bias * scale)
        return up.weight * scale[:, None], up.bias * scale

    def group_key(self) -> Hashable:
        """Of equal configuration, without a gate and norms of its own."""
        config, up = self.config, self.adapter_up
        own = config.ln_before or config.ln_after or self.gate is not None
        return None if own or type(up) is not nn.Linear else (str(config), up.weight.shape, up.weight.dtype)

    @classmethod
    def grouped(cls, group: Group, signal: SublayerSignal, index: Tensor | None) -> SublayerSignal:
        """See the class."""
        first: Any = group.modules[0]

        def part(name: str, x: Tensor) -> Tensor:
            return grouped_linear(x, group.stacked(f"{name}.weight"), index, group.stacked(f"{name}.bias"))

        def change(hidden: Tensor) -> Tensor:
            return part("adapter_up", first.adapter_down[1](part("adapter_down.0", hidden)))

        fixed = not isinstance(first.scaling, nn.Parameter)
        scaling = first.scaling if fixed else per_row(group.stacked("scaling"), index, len(signal))[:, None]
        output: SublayerSignal = first.finish(signal, *first.prepare(signal), change, scaling)
        return output

    def prepare(self, signal: SublayerSignal) -> tuple[Tensor, Tensor]:
        """The input x of the adapter and its residual, both (b, s, d)."""
        config, hidden, stream = self.config, signal.hidden, signal.residual
        if config.is_parallel:
            return stream, hidden
        residual = hidden
        if config.original_ln_before:
            hidden = hidden + stream
            if config.residual_before_ln == "post_add":
                residual = hidden
            hidden = self.normalised(hidden)
        return hidden, hidden if not config.residual_before_ln else residual

    def change(self, hidden: Tensor) -> Tensor:
        """U act(D x)"""
        update: Tensor = self.adapter_up(self.adapter_down(hidden))
        return update

    def finish(
        self, signal: SublayerSignal, hidden: Tensor, residual: Tensor, change: Change, scaling: float | Tensor
    ) -> SublayerSignal:
        """The sub-layer's new output from the adapter's input and its residual, by this change of this scale."""
        config, dtype = self.config, hidden.dtype
        own = self.adapter_up.weight.dtype if isinstance(self.adapter_up, nn.Linear) else self.adapter_up.dtype
        if own != dtype:
            hidden, residual = hidden.to(own), residual.to(own)
        update = change(hidden)
        if config.stochastic_depth and self.training and not config.is_parallel:
            update = _drop_rows(update, config.stochastic_depth)
        if isinstance(scaling, Tensor) or scaling != 1.0:
            update = update * scaling
        output = nn.functional.dropout(update, config.dropout, self.training) if config.dropout else update
        if self.gate is not None:
            gate = token_mean(torch.sigmoid(self.gate(hidden)), self.stack, signal)
            self.report_gate(gate, signal)
            output = output * gate[:, None]
        norm = self.adapter_norm_after
        inside = config.adapter_residual_before_ln and not config.is_parallel
        if norm is not None:
            output = norm(output + residual) if inside else norm(output) + residual
        else:
            output = output + residual
        if own != dtype:
            output, update = output.to(dtype), update.to(dtype)
        changed = SublayerSignal(signal.rows, output, signal.residual, update, signal.final, span=signal.span)
        return self.concluded(changed)

    def concluded(self, signal: SublayerSignal) -> SublayerSignal:
        """With the mark that no residual and no norm follow, where the configuration says so."""
        if self.config.original_ln_after:
            return replace(signal, final=None) if signal.final is not None else signal
        return replace(signal, final=torch.ones_like(signal.hidden[..., :1], dtype=torch.bool))


def _inner_width(config: BnConfig, site: SublayerSite) -> int:
    factors = config.reduction_factor
    factor = factors.get(str(site.layer), factors.get("default")) if isinstance(factors, Mapping) else factors
    if factor is None:
        raise AdapterError(
            f"BnConfig(reduction_factor={factors}): layer {site.layer} has no entry and there is no 'default'; "
            "give the layer's factor or a 'default'."
        )
    return max(1, int(site.width // factor))


def _normal(*linears: Any) -> None:
    for linear in linears:
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)


def _drop_rows(update: Tensor, probability: float) -> Tensor:
    """Stochastic depth: each row is 0 with the given probability, the others grow so that the mean stays."""
    keep = torch.rand(update.shape[0], 1, 1, device=update.device) >= probability
    return update * keep.to(update.dtype) / (1.0 - probability)
