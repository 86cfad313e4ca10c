"""(IA)³: learned vectors that scale the outputs of linear maps."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.registry import register_config, register_preset
from ..grouping import Group, per_row
from ..method import register
from ..signals import LinearSignal
from ..sites import LinearSite
from .lora import LinearChange, LoRAConfig
from .lora_init import initialise
from .patterns import is_target
from .products import plus_change_of_input


@dataclass(eq=False)
class IA3Config(LoRAConfig):
    """Vectors that scale keys, values and the feed-forward activations. Liu et al. 2022, arXiv:2205.05638."""

    intermediate_lora: bool = True
    r: int = 1
    alpha: float = 1
    attn_matrices: list[str] = field(default_factory=lambda: ["k", "v"])
    composition_mode: str = "scale"
    init_weights: str = "ia3"


register_preset(IA3Config, LoRAConfig, lambda config: config.composition_mode == "scale")
register_config("ia3", IA3Config())


@register(LoRAConfig, LinearSite)
class IA3(LinearChange):
    """y = alpha l * (Wx + b)

    Rescaled outputs of a linear map. Liu et al. 2022, arXiv:2205.05638, section 3.3. With ``use_gating`` the vector is
    multiplied by a gate, one for each row.

    Site: LinearSite. Parameters: lora_B = l (out, 1), gate (1, in).
    Start: identity (l = 1, alpha = 1). Merges: yes, with the bias, unless gated.
    Differs from 1.x: a gated one is scaled by alpha too; merging scales the bias, as the forward pass does.
    """

    variant = "ia3"

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config, site, shared)
        self.lora_B = nn.Parameter(torch.empty(site.outputs, 1, dtype=self.dtype))
        initialise(self.lora_B, config.init_weights, zero=True)

    @classmethod
    def wants(cls, config: LoRAConfig, site: LinearSite) -> bool:
        """Where outputs are scaled."""
        return super().wants(config, site) and not scales_input(config, site)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        factor, gate = self.lora_B[:, 0], self.opened(signal)
        factor = factor if self.scale == 1 else factor * self.scale
        factor = factor if gate is None else factor * gate[:, None]
        return replace(signal, output=signal.output * factor.to(signal.output.dtype))

    def group_key(self) -> Hashable:
        """Without a gate."""
        return (self.lora_B.shape, self.lora_B.dtype, self.scale) if self.gate is None else None

    @classmethod
    def grouped(cls, group: Group, signal: LinearSignal, index: Tensor | None) -> LinearSignal:
        """See the class."""
        first: Any = group.modules[0]
        factors = group.stacked("lora_B")[..., 0] * first.scale
        factor = per_row(factors, index, len(signal))[:, None]
        return replace(signal, output=signal.output * factor.to(signal.output.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The rows of W times alpha l."""
        self.refuse_gate()
        return weight * (self.lora_B * self.scale).to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """b times alpha l."""
        return bias * (self.lora_B[:, 0] * self.scale).to(bias.dtype)


def scales_input(config: LoRAConfig, site: LinearSite) -> bool:
    """Whether (IA)³ scales the input of the map at a site."""
    return config.scaled_inputs is not None and is_target(config.scaled_inputs, site)


@register(LoRAConfig, LinearSite)
class InputIA3(LinearChange):
    """y = W (alpha l * x) + b

    Rescaled inputs of a linear map, at the modules that ``scaled_inputs`` names. In front of the second map of a
    feed-forward block this is (IA)³ as published, where the vector follows the activation.

    Site: LinearSite. Parameters: lora_A = l (1, in). Start: identity (l = 1, alpha = 1). Merges: yes.
    In a block it adds the change W (alpha l * x - x).
    """

    variant = "ia3"
    transforms_input = True

    def __init__(self, config: LoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        if config.use_gating:
            raise config.refusal("use_gating", "not possible with scaled_inputs", "gates multiply outputs")
        super().__init__(config, site, shared)
        self.site = site
        self.lora_A = nn.Parameter(torch.empty(1, site.inputs, dtype=self.dtype))
        initialise(self.lora_A, config.init_weights, zero=True)

    @classmethod
    def wants(cls, config: LoRAConfig, site: LinearSite) -> bool:
        """Where inputs are scaled."""
        return super().wants(config, site) and scales_input(config, site)

    def transform_input(self, x: Tensor) -> Tensor:
        """alpha l * x."""
        return x * (self.lora_A[0] * self.scale).to(x.dtype)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        return plus_change_of_input(signal, self.site.map, self.transform_input)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The columns of W times alpha l."""
        return self.transform_input(weight)
