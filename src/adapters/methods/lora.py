"""LoRA: a low-rank change of a linear map."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

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
from ..method import AdapterModule, register, seeded
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

    def _check_scale(self) -> None:
        """(IA)³ multiplies by one vector: it has no rank, no input to drop, no A and B."""
        wrong = "not possible with composition_mode='scale'"
        if self.r != 1:
            raise self.refusal("r", wrong, "it must be 1")
        if self.dropout > 0:
            raise self.refusal("dropout", wrong, "it must be 0")
        if self.use_dora:
            raise self.refusal("use_dora", wrong, "it must be False")
        if self.init_weights == "vera":
            raise self.refusal("init_weights", wrong, "it must be 'ia3', 'bert' or 'lora'")


register_architecture("lora", LoRAConfig)
register_config("lora", LoRAConfig())


@register(LoRAConfig, LinearSite)
class LoRA(AdapterModule[LinearSignal]):
    """y = Wx + (alpha / r) B A x, or y = (alpha / r) l * Wx with ``composition_mode="scale"``

    Low-rank change of a linear map. Hu et al. 2021, arXiv:2106.09685, eq. 3. The second form is (IA)³, Liu et al.
    2022, arXiv:2205.05638, section 3.3. With ``use_gating`` the change is multiplied by a gate, one for each row.

    Site: LinearSite. Parameters: lora_A (r, in), lora_B (out, r), gate (1, in); in the second form lora_B = l (out, 1).
    Start: identity (lora_B = 0; l = 1). Merges: yes, unless gated.
    Differs from 1.x: in a Stack each LoRA sees x, not the previous change; a gated one is scaled by alpha / r too.
    """

    container = "loras"

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.stack, self.config, self.scale = site.source, config, config.alpha / config.r
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self.lora_A = (
            None
            if config.composition_mode == "scale"
            else nn.Parameter(torch.empty(config.r, site.inputs, dtype=dtype))
        )
        self.lora_B = nn.Parameter(torch.empty(site.outputs, config.r, dtype=dtype))
        self.gate = nn.Linear(site.inputs, 1) if config.use_gating else None
        with seeded(config.init_weights_seed):
            self._initialise(config.init_weights)

    @classmethod
    def wants(cls, config: LoRAConfig, site: LinearSite) -> bool:
        """At the projections that the configuration's flags and ``attn_matrices`` name."""
        if config.use_dora or config.vera_d is not None or config.vera_b is not None or config.architecture != "lora":
            raise AdapterError(
                f"add_adapter(config={type(config).__name__}): this version has no implementation of DoRA, VeRA and "
                "MTL-LoRA; use LoRAConfig without use_dora, vera_d and vera_b."
            )
        named = site.location != "selfattn_lora" or site.role in config.attn_matrices
        return bool(config[site.location]) and named and site.layer not in config.leave_out

    @classmethod
    def asks_for(cls, config: LoRAConfig) -> set[str]:
        """The location flags that are set."""
        return {location for location in LinearSite.locations.values() if config[location]}

    def _initialise(self, scheme: str) -> None:
        for matrix in (self.lora_B,) if self.lora_A is None else (self.lora_A, self.lora_B):
            match scheme:
                case "lora" if matrix is self.lora_B:
                    nn.init.zeros_(matrix)
                case "lora":
                    nn.init.kaiming_uniform_(matrix, a=5**0.5)
                case "bert":
                    nn.init.normal_(matrix, std=0.02)
                case "ia3":
                    nn.init.ones_(matrix)
                case _:
                    nn.init.kaiming_uniform_(matrix)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        x = signal.x
        gate = None
        if self.gate is not None:
            gate = token_mean(torch.sigmoid(self.gate(x)), self.stack, signal.rows)
            self.report_gate(gate)
        if self.lora_A is None:
            factor = self.lora_B.T[0] * self.scale
            factor = factor if gate is None else factor * gate[:, None]
            return replace(signal, output=signal.output * factor.to(signal.output.dtype))
        x = dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        x = x if x.dtype == self.lora_A.dtype else x.to(self.lora_A.dtype)
        return plus_low_rank(signal, x, self.lora_A, self.lora_B, self.scale, gate)

    def group_key(self) -> Hashable:
        """Without a gate; all but alpha must be the same."""
        if self.gate is not None or self.lora_A is None:
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

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + (alpha / r) B A, or (alpha / r) l * W."""
        if self.gate is not None:
            raise AdapterError("merge_adapter: Cannot merge LoRA layer with gating; its gate depends on the input.")
        if self.lora_A is None:
            return weight * (self.lora_B * self.scale).to(weight.dtype)
        return weight + (self.lora_B @ self.lora_A * self.scale).to(weight.dtype)


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
