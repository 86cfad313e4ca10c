"""BitFit: training of the biases alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..configuration.base import LATER, AdapterConfig
from ..configuration.checks import check_layers, check_letters
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..method import AdapterModule, register
from ..norms import NormSignal, NormSite
from ..signals import LinearSignal, Signal
from ..sites import LinearSite
from .patterns import ATTENTION_MATRICES, check_targets, check_targets_used, is_target

S = TypeVar("S", bound=Signal)


@dataclass(eq=False)
class BitFitConfig(AdapterConfig):
    """Changes of the bias terms. Ben Zaken et al. 2022, arXiv:2106.10199.

    ``attention``, ``intermediate``, ``output`` and ``norms`` say whose biases: those of the projections of every
    attention that ``attn_matrices`` names, of the two maps of the feed-forward block, and of the norms (those outside
    of the blocks too, with ``outside_blocks``); in all layers but those in ``leave_out``. ``target_modules`` names the
    linear maps in place of the flags, as in ``LinearMethodConfig``. Where the model has no bias
    one is added if ``missing_too``; such an adapter cannot be merged.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "bitfit"
    attention: bool = True
    intermediate: bool = True
    output: bool = True
    norms: bool = True
    outside_blocks: bool = True
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "k", "v", "o"])
    missing_too: bool = False
    leave_out: list[int] = field(default_factory=list)
    target_modules: str | list[str] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_letters(self, "attn_matrices", ATTENTION_MATRICES)
        check_layers(self, "leave_out")
        check_targets(self, "target_modules")

    def check_sites(self, sites: Sequence[Any]) -> None:
        """Every entry of ``target_modules`` fits one of the sites."""
        check_targets_used(self, "target_modules", [site for site in sites if isinstance(site, LinearSite)])


register_architecture("bitfit", BitFitConfig)
register_config("bitfit", BitFitConfig())


class BiasChange(AdapterModule[S]):
    """Δb, which is merged into the bias of its site."""

    container = "bias_adapters"

    def __init__(self, site: LinearSite | NormSite, width: int) -> None:
        super().__init__()
        self.site: Any = site
        self.bias = nn.Parameter(torch.zeros(width))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W."""
        if self.site.bias is None:
            raise AdapterError(
                f"merge_adapter: {self.site.host_path} has no bias that BitFit could be merged into; keep the adapter "
                "active instead, or add it without missing_too."
            )
        return weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        """b + Δb."""
        return bias + self.bias.to(bias.dtype)


@register(BitFitConfig, LinearSite)
class BitFit(BiasChange[LinearSignal]):
    """y = Wx + b + Δb

    A linear map with its own bias. Ben Zaken et al. 2022, arXiv:2106.10199, section 3.

    Site: LinearSite, and NormSite (``BitFitNorm``). Parameters: bias Δb (out,).
    Start: identity (zeros). Merges: yes, where the model has a bias.
    """

    def __init__(self, config: BitFitConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(site, site.outputs)

    @classmethod
    def wants(cls, config: BitFitConfig, site: LinearSite) -> bool:
        """At the maps that the configuration names, if they have a bias."""
        if config.target_modules is not None:
            named = is_target(config.target_modules, site)
        elif site.role in ATTENTION_MATRICES:
            named = config.attention and site.role in config.attn_matrices
        else:
            named = bool(config.get(site.role))
        return named and site.layer not in config.leave_out and (config.missing_too or site.bias is not None)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        return replace(signal, output=signal.output + self.bias.to(signal.output.dtype))


@register(BitFitConfig, NormSite)
class BitFitNorm(BiasChange[NormSignal]):
    """y = n(x) w + b + Δb: see ``BitFit``."""

    def __init__(self, config: BitFitConfig, site: NormSite, shared: nn.Module | None = None) -> None:
        super().__init__(site, site.width)

    @classmethod
    def wants(cls, config: BitFitConfig, site: NormSite) -> bool:
        """At the norms, if the configuration names them and they have a bias."""
        placed = site.layer >= 0 or config.outside_blocks
        has_bias = config.missing_too or site.bias is not None
        return config.norms and placed and has_bias and site.layer not in config.leave_out

    def forward(self, signal: NormSignal) -> NormSignal:
        """See the class."""
        bias = self.site.bias
        if signal.output is None and bias is not None:
            return replace(signal, output=self.site.normalise(signal.x, self.site.weight, self.merged_bias(bias)))
        output = signal.result()
        return replace(signal, output=output + self.bias.to(output.dtype))
