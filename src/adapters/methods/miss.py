"""MiSS: one small matrix is the change of every shard of a linear map."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from ..configuration.checks import check_choice, check_fraction, check_integer
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..errors import AdapterError
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearMethod, LinearMethodConfig
from .products import plus_product


@dataclass(eq=False)
class MiSSConfig(LinearMethodConfig):
    """Changes that the shards of a linear map share. Kang and Yin 2024, arXiv:2409.15371; former name: Bone.

    ``r`` is the width of a shard of inputs. ``variant``: ``"miss"`` adds one matrix to all shards; ``"mini"`` one that
    is also shared by the shards of ``mini_r`` outputs; ``"bat"`` one, for each shard of r outputs, that also depends on
    the weight (r must divide inputs and outputs). ``dropout`` is that of the change's input. ``init_weights=False``
    starts from random values.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "miss"
    r: int = 64
    variant: str = "miss"
    mini_r: int = 1
    dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "r", least=1)
        check_choice(self, "variant", ("miss", "mini", "bat"))
        check_integer(self, "mini_r", least=1)
        check_fraction(self, "dropout")
        if self.mini_r != 1 and self.variant != "mini":
            raise self.refusal("mini_r", f"without effect for variant={self.variant!r}", "set variant='mini'")


register_architecture("miss", MiSSConfig)
register_config("miss", MiSSConfig())
register_config("bone", MiSSConfig(), "miss")


@register(MiSSConfig, LinearSite)
class MiSS(LinearMethod):
    """y = Wx + b + M^T (x_1 + x_2 + ... + x_n), where the x_j are the shards of r inputs each

    Matrix shard sharing. Kang and Yin 2024, arXiv:2409.15371, eq. 3; the last shard is filled up with zeros. ``"mini"``
    repeats M along the outputs. ``"bat"`` changes the shards W_ij (r, r) of the weight to W_ij + W_ij M_i + M_i.

    Site: LinearSite. Parameters: miss_block (r, out), (r, mini_r) or (out / r, r, r). Start: identity (miss_block = 0).
    Merges: yes. In a block it adds its change.
    """

    changes_weight = True

    def __init__(self, config: MiSSConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.site, self.config = site, config
        _check_shards(config, site)
        match config.variant:
            case "miss":
                self.miss_block = self.new(config.r, site.outputs)
            case "mini":
                self.miss_block = self.new(config.r, config.mini_r)
            case _:
                self.miss_block = self.new(site.outputs // config.r, config.r, config.r)
        self._kept = Derived()
        with seeded(config.init_weights_seed):
            if config.init_weights:
                nn.init.zeros_(self.miss_block)
            else:
                nn.init.kaiming_uniform_(self.miss_block, a=5**0.5)

    def _up(self) -> Tensor:
        """(r, out) the matrix of all shards."""
        block = self.miss_block
        return block if self.config.variant == "miss" else block.repeat(1, self.site.outputs // self.config.mini_r)

    def _bat(self) -> Tensor:
        """(out, in) the change of the weight."""
        width, block = self.config.r, self.miss_block
        weight = self.site.weight.to(block.dtype)
        rows = torch.bmm(weight.reshape(len(block), -1, width), block).view(len(block), width, -1, width)
        return (rows + block[:, :, None]).reshape(self.site.outputs, self.site.inputs)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        x = signal.x.to(self.miss_block.dtype)
        x = dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        if self.config.variant == "bat":
            return plus_product(signal, x, self._kept.get("bat", [self.miss_block, self.site.stored], self._bat))
        missing = -x.shape[-1] % self.config.r
        x = pad(x, (0, missing)) if missing else x
        return plus_product(signal, x.reshape(*x.shape[:-1], -1, self.config.r).sum(-2), self._up().T)

    @property
    def replaces_weight(self) -> bool:
        """For "bat", as long as nothing of the input is dropped."""
        return self.config.variant == "bat" and not (self.config.dropout and self.training)

    def replaced_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW, kept until one of its parameters changes."""
        return self._kept.get("weight", [weight, self.miss_block], lambda: self.merged_weight(weight))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with the change added."""
        if self.config.variant == "bat":
            return weight + self._bat().to(weight.dtype)
        shards = -(-self.site.inputs // self.config.r)
        return weight + self._up().T.repeat(1, shards)[:, : self.site.inputs].to(weight.dtype)


def _check_shards(config: MiSSConfig, site: LinearSite) -> None:
    widths = {"r": (site.inputs, site.outputs), "mini_r": (site.outputs,)}
    name = {"miss": "", "mini": "mini_r", "bat": "r"}[config.variant]
    if config.r > site.inputs or (name and any(width % config[name] for width in widths[name])):
        raise AdapterError(
            f"add_adapter(config=MiSSConfig(variant={config.variant!r}, r={config.r}, mini_r={config.mini_r})): "
            f"the map at {site.path} has {site.inputs} inputs and {site.outputs} outputs; r must be at most "
            "the inputs, mini_r divide the outputs (mini), and r divide both (bat)."
        )
