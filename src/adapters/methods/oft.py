"""OFT: the input of a linear map is rotated, block by block."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..configuration.checks import check_fraction, check_integer, check_number
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..errors import AdapterError
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearMethod, LinearMethodConfig
from .products import plus_change_of_input

NARROW = 8
"""Blocks of so many inputs or fewer are multiplied from the left: the rows of a batch are then what is contiguous."""


@dataclass(eq=False)
class OFTConfig(LinearMethodConfig):
    """Rotations of the inputs of linear maps. Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025, arXiv:2506.19847.

    The input is cut into blocks of ``block_size`` numbers (or into ``block_num`` blocks, with ``block_size=0``), each
    of which has a rotation of its own, or (``block_share``) all the same. A rotation is made of a skew-symmetric matrix
    by the Cayley transform, or (``use_cayley_neumann``) by the first ``num_cayley_neumann_terms`` terms of a series for
    it. ``coft`` keeps the skew-symmetric matrices within a Frobenius norm of ``eps`` divided by the root of the number
    of blocks. ``dropout`` is the probability of a block to be left alone in a training step. ``init_weights=False``
    starts from random rotations.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "oft"
    block_size: int = 32
    block_num: int = 0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    dropout: float = 0.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self)
        check_number(self, "eps", above=0)
        check_integer(self, "num_cayley_neumann_terms", least=1)
        check_fraction(self, "dropout")


def check_blocks(config: LinearMethodConfig) -> None:
    """One of ``block_size`` and ``block_num`` is given, the other one is 0."""
    for name in ("block_size", "block_num"):
        check_integer(config, name, least=0)
    if (config["block_size"] == 0) == (config["block_num"] == 0):
        wrong = f"in conflict with block_size={config['block_size']}"
        raise config.refusal("block_num", wrong, "one of the two must be 0, since their product is the map's width")


def block_size(config: LinearMethodConfig, site: LinearSite) -> int:
    """The number of inputs of a block at this site.

    Raises:
        AdapterError: the map's inputs cannot be cut in that way.
    """
    name = "block_size" if config["block_size"] else "block_num"
    if site.inputs % config[name]:
        raise AdapterError(
            f"add_adapter(config={type(config).__name__}({name}={config[name]})): the map at {site.path} has "
            f"{site.inputs} inputs, which is no multiple of it; choose a divisor of {site.inputs}."
        )
    return int(config["block_size"] or site.inputs // config["block_num"])


register_architecture("oft", OFTConfig)
register_config("oft", OFTConfig())


@register(OFTConfig, LinearSite)
class OFT(LinearMethod):
    """y = W (R x) + b, with R = diag(R_1, ..., R_n) orthogonal

    R_i = (I + S_i)^-1 (I - S_i), or I + 2 S + 2 S^2 + ... + S^(t - 1) with S = -S_i, cut after t terms; S_i is
    skew-symmetric, with the entries of oft_R above its diagonal. Qiu et al. 2023, arXiv:2306.07280, section 3.

    Site: LinearSite. Parameters: oft_R (n, k (k - 1) / 2) for n blocks of k inputs, n = 1 with ``block_share``.
    Start: identity (oft_R = 0). Merges: yes.
    In a block, and at a slice of a fused map, it is a change that is added: W (R x - x), with one more product. So
    ``Stack(oft, lora)`` is W R x + b + B A x; and ``Stack(oft_1, oft_2)`` adds two changes, of the same x.
    Differs from PEFT: ``dropout`` works (PEFT's ``module_dropout`` is ignored); ``block_num`` is its ``r``; a width
    that cannot be cut is refused; ``coft`` changes the parameters in training only.
    """

    transforms_input = True

    if TYPE_CHECKING:
        index: Tensor
        sign: Tensor

    def __init__(self, config: OFTConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.site, self.config = site, config
        size = block_size(config, site)
        self.count, self.size = site.inputs // size, size
        self.oft_R = self.new(1 if config.block_share else self.count, size * (size - 1) // 2)
        index, sign = skew_layout(size)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("sign", sign.to(self.oft_R.dtype), persistent=False)
        self._kept = Derived()
        with seeded(config.init_weights_seed):
            nn.init.normal_(self.oft_R, std=0.0 if config.init_weights else 0.1)

    def blocks(self) -> Tensor:
        """(n or 1, k, k) the transposed rotations."""
        return self._kept.get("blocks", [self.oft_R], self._compute)

    def _compute(self) -> Tensor:
        weight = self._bounded() if self.config.coft else self.oft_R
        skew = weight.index_select(1, self.index).view(-1, self.size, self.size) * self.sign
        return self._neumann(skew) if self.config.use_cayley_neumann else cayley(skew)

    def _bounded(self) -> Tensor:
        """The parameters, each block's within the bound; the gradient is that at the bound."""
        most = self.config.eps / len(self.oft_R) ** 0.5
        with torch.no_grad():
            norm = self.oft_R.norm(dim=1, keepdim=True) * 2**0.5  # an entry stands twice in the matrix
            within = torch.where(norm <= most, self.oft_R, self.oft_R * (most / norm.clamp(min=most)))
            if self.training and self.oft_R.requires_grad:
                self.oft_R.copy_(within)
        return self.oft_R + (within - self.oft_R).detach()

    def _neumann(self, skew: Tensor) -> Tensor:
        identity = torch.eye(self.size, dtype=skew.dtype, device=skew.device)
        terms = self.config.num_cayley_neumann_terms
        if terms < 3:
            return identity + (2 * terms - 2) * skew
        twice = (2 * identity).expand_as(skew)
        series = twice + skew
        for _ in range(max(terms - 3, 1)):  # PEFT has as many for 3 as for 4
            series = torch.baddbmm(twice, skew, series)
        return torch.baddbmm(identity.expand_as(skew), skew, series)

    def transform_input(self, x: Tensor) -> Tensor:
        """R x, of the dtype of x."""
        blocks = self.blocks()
        if self.training and self.config.dropout:
            blocks = drop_blocks(blocks, self.count, self.config.dropout)
        return rotate(x.to(blocks.dtype), blocks, self.count).to(x.dtype)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        return plus_change_of_input(signal, self.site.map, self.transform_input)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W R."""
        blocks = self.blocks().mT
        return rotate(weight.to(blocks.dtype), blocks, self.count).to(weight.dtype)


def skew_layout(size: int) -> tuple[Tensor, Tensor]:
    """For each entry of a skew-symmetric matrix which parameter it is (size^2), and its sign (size, size)."""
    index, rows = torch.zeros(size, size, dtype=torch.long), torch.triu_indices(size, size, 1)
    index[rows[0], rows[1]] = torch.arange(rows.shape[1])
    upper = torch.ones(size, size).triu(1)
    return (index + index.T).flatten(), upper - upper.T


def cayley(skew: Tensor) -> Tensor:
    """(n, k, k) the orthogonal (I - S) (I + S)^-1 for skew-symmetric S, computed in float32 at least."""
    wide = skew if skew.dtype == torch.float64 else skew.float()
    identity = torch.eye(skew.shape[-1], dtype=wide.dtype, device=skew.device)
    orthogonal: Tensor = torch.linalg.solve(identity + wide, identity - wide, left=False)
    return orthogonal.to(skew.dtype)


def drop_blocks(blocks: Tensor, count: int, share: float) -> Tensor:
    """(count, k, k) the blocks, of which each is the identity with probability `share`."""
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    dropped = torch.rand(count, 1, 1, device=blocks.device) < share
    return torch.where(dropped, identity, blocks)


def rotate(x: Tensor, blocks: Tensor, count: int) -> Tensor:
    """x (..., d) times diag(blocks), for blocks (count or 1, k, k)."""
    size = blocks.shape[-1]
    if blocks.shape[0] != count:
        return (x.reshape(-1, size) @ blocks[0]).view(x.shape)
    if size > NARROW:
        rows = x.reshape(-1, count, size).transpose(0, 1)
        return torch.bmm(rows, blocks).transpose(0, 1).reshape(x.shape)
    columns = x.reshape(-1, count * size).T.view(count, size, -1)
    return torch.bmm(blocks.mT, columns).view(count * size, -1).T.contiguous().view(x.shape)
