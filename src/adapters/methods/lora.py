"""LoRA: a low-rank change of a linear map."""

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..configuration.base import AdapterConfig
from ..configuration.checks import (
    check_choice,
    check_dtype,
    check_fraction,
    check_integer,
    check_layers,
    check_letters,
    check_number,
)
from ..configuration.registry import register_architecture, register_config
from ..context import token_mean
from ..errors import AdapterError
from ..grouping import Group, grouped_linear, per_row
from ..method import AdapterModule, register
from ..signals import LinearSignal
from ..sites import LinearSite

ATTENTION_MATRICES = ("q", "k", "v", "o")
INITIALISATIONS = ("lora", "bert", "ia3", "vera")


@dataclass(eq=False)
class LoRAConfig(AdapterConfig):
    """Low-rank changes of the linear maps of a model. Hu et al. 2021, arXiv:2106.09685.

    ``selfattn_lora`` changes the projections of every attention that ``attn_matrices`` names (q, k, v and o, the
    output), ``intermediate_lora`` the first and ``output_lora`` the second map of the feed-forward block, in all
    layers but those in ``leave_out``. The change has rank ``r`` and is scaled by ``alpha / r``. ``dtype`` is the name
    of the torch dtype of the new parameters; None is that of the model. ``composition_mode="scale"`` is (IA)³,
    ``use_dora`` is DoRA, ``vera_d`` and ``vera_b`` (the start values of its vectors) are VeRA.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "lora"
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = field(default_factory=list)
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    composition_mode: str = "add"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "leave_out")
        check_integer(self, "r", least=1)
        check_number(self, "alpha")
        check_fraction(self, "dropout")
        check_letters(self, "attn_matrices", ATTENTION_MATRICES)
        check_choice(self, "composition_mode", ("add", "scale"))
        check_choice(self, "init_weights", INITIALISATIONS)
        for name in ("vera_d", "vera_b"):
            if self[name] is not None:
                check_number(self, name)
                self.normalize(name, float(self[name]))
        check_dtype(self, "dtype")
        if self.composition_mode == "scale":
            self._check_scale()

    @property
    def variant(self) -> str:
        """Which kind of change the fields describe: "lora", "ia3", "dora", "vera" or "dvora"."""
        if self.composition_mode == "scale":
            return "ia3"
        is_vera = self.vera_d is not None or self.vera_b is not None
        if self.use_dora:
            return "dvora" if is_vera else "dora"
        return "vera" if is_vera else "lora"

    def _check_scale(self) -> None:
        """(IA)³ multiplies by one vector: it has no rank, no input to drop, no A and B."""
        wrong = "not possible with composition_mode='scale'"
        if self.r != 1:
            raise self.refusal("r", wrong, "it must be 1")
        if self.dropout > 0:
            raise self.refusal("dropout", wrong, "it must be 0")
        if self.use_dora:
            raise self.refusal("use_dora", wrong, "it must be False")
        for name in ("vera_d", "vera_b"):
            if self[name] is not None:
                raise self.refusal(name, wrong, "it must be None")
        if self.init_weights == "vera":
            raise self.refusal("init_weights", wrong, "it must be 'ia3', 'bert' or 'lora'")


register_architecture("lora", LoRAConfig)
register_config("lora", LoRAConfig())


class LinearChange(AdapterModule[LinearSignal]):
    """What the kinds of change that a LoRAConfig describes have in common: their places, scale and gate.

    variant: which configurations mean this kind, see ``LoRAConfig.variant``.
    """

    container = "loras"
    variant: ClassVar[str]

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.stack, self.config, self.scale = site.source, config, config.alpha / config.r
        self.dtype: torch.dtype | None = None if config.dtype is None else getattr(torch, config.dtype)
        self.gate = nn.Linear(site.inputs, 1) if config.use_gating else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)

    @classmethod
    def wants(cls, config: LoRAConfig, site: LinearSite) -> bool:
        """At the projections that the configuration's flags and ``attn_matrices`` name."""
        named = site.location != "selfattn_lora" or site.role in config.attn_matrices
        chosen = config.variant == cls.variant and bool(config[site.location])
        return chosen and named and site.layer not in config.leave_out

    @classmethod
    def asks_for(cls, config: LoRAConfig) -> set[str]:
        """The location flags that are set."""
        return {location for location in LinearSite.locations.values() if config[location]}

    def opened(self, signal: LinearSignal) -> Tensor | None:
        """(b, 1) how far the gate is open for each row, which is reported; None without a gate."""
        if self.gate is None:
            return None
        x = signal.x if signal.x.dtype == self.gate.weight.dtype else signal.x.to(self.gate.weight.dtype)
        gate = token_mean(torch.sigmoid(self.gate(x)), self.stack, signal.rows)
        self.report_gate(gate)
        return gate

    def refuse_gate(self) -> None:
        """A gated change cannot be merged.

        Raises:
            AdapterError: there is a gate.
        """
        if self.gate is not None:
            raise AdapterError("merge_adapter: Cannot merge LoRA layer with gating; its gate depends on the input.")


class LowRankChange(LinearChange):
    """y = Wx + scale up down x"""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """down (r, in) and up (out, r)."""

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input of the change: x after dropout, in the dtype of the matrices."""
        x = dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        return x if x.dtype == dtype else x.to(dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + scale up down."""
        self.refuse_gate()
        down, up = self.factors()
        return weight + (up @ down * self.scale).to(weight.dtype)


@register(LoRAConfig, LinearSite)
class LoRA(LowRankChange):
    """y = Wx + (alpha / r) B A x

    Low-rank change of a linear map. Hu et al. 2021, arXiv:2106.09685, eq. 3. With ``use_gating`` the change is
    multiplied by a gate, one for each row.

    Site: LinearSite. Parameters: lora_A (r, in), lora_B (out, r), gate (1, in).
    Start: identity (lora_B = 0). Merges: yes, unless gated.
    Differs from 1.x: in a Stack each LoRA sees x, not the previous change; a gated one is scaled by alpha / r too.
    """

    variant = "lora"

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.lora_A = nn.Parameter(torch.empty(config.r, site.inputs, dtype=self.dtype))
        self.lora_B = nn.Parameter(torch.empty(site.outputs, config.r, dtype=self.dtype))
        initialise(self.lora_A, config.init_weights, zero=False)
        initialise(self.lora_B, config.init_weights, zero=True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.lora_A, self.lora_B

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        x = self.dropped(signal.x, self.lora_A.dtype)
        return plus_low_rank(signal, x, self.lora_A, self.lora_B, self.scale, self.opened(signal))

    def group_key(self) -> Hashable:
        """Without a gate; all but alpha must be the same."""
        if self.gate is not None:
            return None
        return self.lora_A.shape, self.lora_B.shape, self.lora_A.dtype, self.config.dropout

    @classmethod
    def grouped(cls, group: Group, signal: LinearSignal, index: Tensor | None) -> LinearSignal:
        """See the class."""
        down, up = group.stacked("lora_A"), group.stacked("lora_B")
        modules: list[Any] = group.modules
        share = modules[0].config.dropout
        x = dropout(signal.x, share, modules[0].training) if share else signal.x
        low = grouped_linear(x.to(down.dtype), down, index)
        scales = [module.scale for module in modules]
        if any(scale != 1 for scale in scales):
            low = (
                low * per_row(torch.tensor(scales, dtype=low.dtype, device=low.device), index, len(low))[:, None, None]
            )
        if low.dtype == signal.output.dtype:
            return replace(signal, output=grouped_linear(low, up, index, onto=signal.output))
        return replace(signal, output=signal.output + grouped_linear(low, up, index).to(signal.output.dtype))


def initialise(matrix: Tensor, scheme: str, zero: bool) -> None:
    """Start values by ``init_weights``; zero: this is the matrix that scheme "lora" starts at 0."""
    match scheme:
        case "lora" if zero:
            nn.init.zeros_(matrix)
        case "lora":
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        case "bert":
            nn.init.normal_(matrix, std=0.02)
        case "ia3":
            nn.init.ones_(matrix)
        case _:
            nn.init.kaiming_uniform_(matrix)


def plus_low_rank(
    signal: LinearSignal, x: Tensor, down: Tensor, up: Tensor, scale: float, gate: Tensor | None = None
) -> LinearSignal:
    """The signal with scale * gate * up down x added, in the order of calls that is the fastest for its shapes.

    x: (b, s, in); down: (r, in); up: (out, r); gate: (b, 1).
    """
    output = signal.output
    alike = output.dtype == x.dtype == up.dtype
    if alike and gate is None and not torch.is_grad_enabled():
        low = torch.mm(down, x.flatten(0, -2).T)  # (r, b s): with few rows half the time of (b s, r)
        flat = output.flatten(0, -2)
        if signal.owned and not torch.compiler.is_compiling() and flat.data_ptr() == output.data_ptr():
            flat.addmm_(low.T, up.T, alpha=scale)
            return signal
        return LinearSignal(signal.rows, signal.x, torch.addmm(flat, low.T, up.T, alpha=scale).view(output.shape))
    low = linear(x, down)
    if gate is not None:
        low = low * gate[:, None]
    if alike and output.dim() == 3:
        output = torch.baddbmm(output, low, up.T.expand(low.shape[0], -1, -1), alpha=scale)
    else:
        output = output + (linear(low, up) * scale).to(output.dtype)
    return LinearSignal(signal.rows, signal.x, output)
