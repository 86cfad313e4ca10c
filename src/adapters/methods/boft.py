"""BOFT: the input of a linear map is rotated by sparse rotations, one after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..configuration.checks import check_fraction, check_integer
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..errors import AdapterError
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearMethod, LinearMethodConfig
from .oft import block_size, cayley, check_blocks, drop_blocks, rotate


@dataclass(eq=False)
class BOFTConfig(LinearMethodConfig):
    """Butterfly rotations of the inputs of linear maps. Liu et al. 2023, arXiv:2311.06243.

    Each of ``n_butterfly_factor`` factors rotates blocks of ``block_size`` inputs (or ``block_num`` blocks, with
    ``block_size=0``); the i-th factor's blocks hold numbers that are 2^(i - 1) half blocks apart, so that m factors mix
    2^(m - 1) blocks. ``dropout`` is the probability of a block to be left alone in a training step.
    ``init_weights=False`` starts from random rotations and scales.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "boft"
    block_size: int = 4
    block_num: int = 0
    n_butterfly_factor: int = 1
    dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self)
        check_integer(self, "n_butterfly_factor", least=1)
        check_fraction(self, "dropout")


register_architecture("boft", BOFTConfig)
register_config("boft", BOFTConfig())


@register(BOFTConfig, LinearSite)
class BOFT(LinearMethod):
    """y = s * W (B_m ... B_2 B_1)^T x + b, with every B_i = P_i diag(R_i1, ..., R_in) P_i^T orthogonal

    Butterfly orthogonal fine-tuning. Liu et al. 2023, arXiv:2311.06243, section 4. P_i is a permutation,
    R_ij = (I - S) (I + S)^-1 with S the skew-symmetric part of boft_R_ij.

    Site: LinearSite. Parameters: boft_R (m, n, k, k) for n blocks of k inputs, boft_s (out, 1).
    Start: identity (boft_R = 0, s = 1). Merges: yes.
    In a block, and at a slice of a fused map, the change against Wx is added, with two more products.
    Differs from PEFT: several factors work without its CUDA extension; ``dropout`` draws for each block of all factors.
    """

    transforms_input = True

    def __init__(self, config: BOFTConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.site, self.config = site, config
        self.size = block_size(config, site)
        self.count = site.inputs // self.size
        _check_factors(config, site, self.size, self.count)
        self.boft_R = self.new(config.n_butterfly_factor, self.count, self.size, self.size)
        self.boft_s = self.new(site.outputs, 1)
        self._kept = Derived()
        with seeded(config.init_weights_seed):
            std = 0.0 if config.init_weights else 0.1
            nn.init.normal_(self.boft_R, std=std)
            nn.init.normal_(self.boft_s, mean=1.0, std=std)

    def blocks(self) -> Tensor:
        """(m, n, k, k) the rotations."""
        return self._kept.get("blocks", [self.boft_R], lambda: cayley((self.boft_R - self.boft_R.mT) / 2))

    def transform_input(self, x: Tensor) -> Tensor:
        """The rotated input, of the dtype of x."""
        blocks = self.blocks()
        if self.training and self.config.dropout:
            dropped = drop_blocks(blocks.flatten(0, 1), blocks.shape[0] * self.count, self.config.dropout)
            blocks = dropped.view_as(blocks)
        rotated = x.to(blocks.dtype)
        for factor in reversed(range(len(blocks))):
            rotated = self._turn(rotated, blocks[factor], factor)
        return rotated.to(x.dtype)

    def _turn(self, x: Tensor, blocks: Tensor, factor: int) -> Tensor:
        """x (..., d) times P diag(blocks) P^T."""
        if factor == 0:
            return rotate(x, blocks, self.count)
        mixed = x.reshape(-1, self.count >> factor, 2, 1 << factor, self.size // 2).transpose(2, 3)
        turned = rotate(mixed.reshape(-1, self.site.inputs), blocks, self.count)
        parts = turned.reshape(-1, self.count >> factor, 1 << factor, 2, self.size // 2)
        return parts.transpose(2, 3).reshape(x.shape)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        scale = self.boft_s[:, 0].to(signal.output.dtype)
        if not signal.transformed:
            rotated, plain = self.site.map(self.transform_input(signal.x)), self.site.map(signal.x)
            return signal.giving(signal.output + (rotated * scale - plain))
        bias = self.site.bias
        output = signal.output * scale if bias is None else torch.addcmul(bias - bias * scale, signal.output, scale)
        return signal.giving(output)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """s * W (B_m ... B_1)^T."""
        blocks = self.blocks().mT
        merged = weight.to(blocks.dtype)
        for factor, transposed in enumerate(blocks):
            merged = self._turn(merged, transposed, factor)
        return (merged * self.boft_s).to(weight.dtype)


def _check_factors(config: BOFTConfig, site: LinearSite, size: int, count: int) -> None:
    """With more than one factor halves of blocks are exchanged, within groups of 2^(factors - 1) blocks."""
    factors = config.n_butterfly_factor
    if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
        raise AdapterError(
            f"add_adapter(config=BOFTConfig(n_butterfly_factor={factors})): the {site.inputs} inputs of {site.path} "
            f"are {count} blocks of {size}; the size must be even, and the number of blocks a multiple of "
            f"2^(n_butterfly_factor - 1) = {2 ** (factors - 1)}. Use fewer factors or another block_size."
        )
