"""SHiRA: a change of a few entries of a linear map's weight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..configuration.checks import check_integer
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..method import register, seeded
from ..sites import LinearSite
from .linear_method import LinearUpdate, LinearUpdateConfig


@dataclass(eq=False)
class SHiRAConfig(LinearUpdateConfig):
    """Changes of r (in + out) randomly chosen entries of each weight. Bhardwaj et al. 2024, arXiv:2406.13175.

    ``random_seed`` (without one, ``init_weights_seed``) draws the entries, the same at every map of one shape; without
    either they are drawn anew at each.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "shira"
    r: int = 32
    random_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "r", least=1)
        if self.random_seed is not None:
            check_integer(self, "random_seed", least=0)


register_architecture("shira", SHiRAConfig)
register_config("shira", SHiRAConfig())


@register(SHiRAConfig, LinearSite)
class SHiRA(LinearUpdate):
    """y = Wx + Sx, where S is zero but at r (in + out) entries

    A sparse change of high rank, with as many parameters as a LoRA of rank r has. Bhardwaj et al. 2024,
    arXiv:2406.13175, section 3 (SHiRA-Rand).

    Site: LinearSite. Parameters: shira_weight (r (in + out),); buffer: shira_indices (2, r (in + out)), the row and
    column of each.
    Start: identity (zeros). Merges: yes.
    Differs from PEFT: the entries are saved with the adapter.
    """

    shira_indices: Tensor

    def __init__(self, config: SHiRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.shape = site.outputs, site.inputs
        size, number = site.outputs * site.inputs, config.r * (site.outputs + site.inputs)
        if number > size:
            raise AdapterError(
                f"add_adapter(SHiRAConfig(r={config.r})): {number} entries of the weight of {site.host_path} would "
                f"change, it has {size}; r can be {size // (site.outputs + site.inputs)} at most here."
            )
        self.shira_weight = self.new(number)
        nn.init.zeros_(self.shira_weight)
        with seeded(config.init_weights_seed if config.random_seed is None else config.random_seed):
            chosen = torch.randperm(size)[:number].sort().values
        indices = torch.stack([chosen // site.inputs, chosen % site.inputs])
        self.register_buffer("shira_indices", indices.int())

    def delta(self) -> Tensor:
        """S (out, in)."""
        rows, columns = self.shira_indices.long()
        zeros = self.shira_weight.new_zeros(self.shape)
        return zeros.index_put((rows, columns), self.shira_weight)
