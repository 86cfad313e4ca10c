"""LN tuning: training of the norms alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.base import LATER, AdapterConfig
from ..configuration.checks import check_layers
from ..configuration.registry import register_architecture, register_config
from ..method import AdapterModule, register
from ..norms import NormSignal, NormSite
from .patterns import check_targets, check_targets_used, is_target


@dataclass(eq=False)
class LNTuningConfig(AdapterConfig):
    """Changes of the weights and biases of the norms. Zhao et al. 2023, arXiv:2312.11420.

    In all layers but those in ``leave_out``; ``outside_blocks`` has the norms of the embeddings and of the model's
    output too; or else ``target_modules`` names the norms, as in ``LinearMethodConfig``. ``bias`` says whether biases,
    where the norm has one, change beside the weights.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "ln_tuning"
    outside_blocks: bool = True
    bias: bool = True
    leave_out: list[int] = field(default_factory=list)
    target_modules: str | list[str] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "leave_out")
        check_targets(self, "target_modules")

    def check_sites(self, sites: Sequence[Any]) -> None:
        """Every entry of ``target_modules`` fits one of the sites."""
        check_targets_used(self, "target_modules", sites)


register_architecture("ln_tuning", LNTuningConfig)
register_config("ln_tuning", LNTuningConfig())


@register(LNTuningConfig, NormSite)
class LNTuning(AdapterModule[NormSignal]):
    """y = n(x) (w + Δw) + b + Δb

    A norm with its own weight and bias. Zhao et al. 2023, arXiv:2312.11420, section 2. Kept are the differences to the
    model's, so that adapters add up in a Stack and weight decay leads back to the model.

    Site: NormSite. Parameters: weight Δw (d,), bias Δb (d,).
    Start: identity (zeros). Merges: yes.
    Differs from PEFT: PEFT keeps w + Δw itself, for one adapter at a time.
    """

    container = "norm_adapters"

    def __init__(self, config: LNTuningConfig, site: NormSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(torch.zeros(site.width))
        self.bias = nn.Parameter(torch.zeros(site.width)) if config.bias and site.bias is not None else None

    @classmethod
    def wants(cls, config: LNTuningConfig, site: NormSite) -> bool:
        """At every norm, or every one that ``target_modules`` names, of the layers that are not left out."""
        if config.target_modules is not None:
            return site.layer not in config.leave_out and is_target(config.target_modules, site)
        return site.layer not in config.leave_out and (site.layer >= 0 or config.outside_blocks)

    def forward(self, signal: NormSignal) -> NormSignal:
        """See the class."""
        site, bias = self.site, self.site.bias
        weight = self.merged_weight(site.weight)
        tuned = site.normalise(signal.x, weight, None if bias is None else self.merged_bias(bias))
        if signal.output is not None:
            tuned = signal.output + (tuned - signal.original(signal.x))
        return replace(signal, output=tuned)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """w + Δw."""
        return weight + self.weight.to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """b + Δb."""
        return bias if self.bias is None else bias + self.bias.to(bias.dtype)
