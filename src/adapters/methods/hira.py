"""HiRA: a change of a linear map that is low-rank relative to its weight."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..configuration.checks import check_integer
from ..configuration.registry import register_architecture, register_config
from ..method import register, seeded
from ..sites import LinearSite
from .linear_method import LinearUpdate, LinearUpdateConfig


@dataclass(eq=False)
class HiRAConfig(LinearUpdateConfig):
    """Changes of weights in proportion to themselves, by factors of rank ``r``. Huang et al. 2025, ICLR.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "hira"
    r: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "r", least=1)


register_architecture("hira", HiRAConfig)
register_config("hira", HiRAConfig())


@register(HiRAConfig, LinearSite)
class HiRA(LinearUpdate):
    """y = Wx + (W ⊙ BA) x

    A change of high rank from few parameters: each weight is multiplied by 1 + (BA)ᵢⱼ. Huang et al. 2025, "HiRA:
    Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", eq. 5.

    Site: LinearSite. Parameters: hira_A (r, in), hira_B (out, r).
    Start: identity (hira_B = 0). Merges: yes.
    """

    def __init__(self, config: HiRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.site = site
        self.hira_A, self.hira_B = self.new(config.r, site.inputs), self.new(site.outputs, config.r)
        with seeded(config.init_weights_seed):
            nn.init.kaiming_uniform_(self.hira_A, a=5**0.5)
        nn.init.zeros_(self.hira_B)

    def sources(self) -> list[Tensor]:
        """See the base."""
        return [*self.parameters(), self.site.stored]

    def delta(self) -> Tensor:
        """W ⊙ BA."""
        return self.site.weight.to(self.hira_A.dtype) * (self.hira_B @ self.hira_A)
