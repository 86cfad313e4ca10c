"""HRA: the input of a linear map is reflected at a few hyperplanes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..configuration.checks import check_integer
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearMethod, LinearMethodConfig
from .products import plus_low_rank


@dataclass(eq=False)
class HRAConfig(LinearMethodConfig):
    """Reflections of the inputs of linear maps. Yuan et al. 2024, arXiv:2405.17484.

    ``r`` is the number of reflections. ``apply_GS`` makes their directions orthogonal, by Gram and Schmidt.
    The start is the identity where it can be: with an even ``r``, without ``apply_GS`` and with ``init_weights``.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "hra"
    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "r", least=1)


register_architecture("hra", HRAConfig)
register_config("hra", HRAConfig())


@register(HRAConfig, LinearSite)
class HRA(LinearMethod):
    """y = W H_1 H_2 ... H_r x + b, with H_i = I - 2 u_i u_i^T / |u_i|^2

    Householder reflection adaptation. Yuan et al. 2024, arXiv:2405.17484, eq. 3.

    Site: LinearSite. Parameters: hra_u (in, r), the u_i. Start: identity (u_1 = u_2, u_3 = u_4, ...) for an even r.
    Merges: yes. In a block it adds its change W (H_1 ... H_r x - x).

    Computed as a change of rank r, which costs what LoRA does: H_1 ... H_r = I - Z K^-1 Z^T. The columns of Z are, pair
    by pair, v_1 and v_2 - v_1, with v_i = u_i / |u_i|; so equal directions give an exact zero.
    Differs from PEFT: with ``apply_GS`` the directions start at random, since orthogonal ones cannot be equal.
    """

    if TYPE_CHECKING:
        mask: Tensor
        constant: Tensor

    def __init__(self, config: HRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.site, self.config = site, config
        self.hra_u = self.new(site.inputs, config.r)
        mask, constant = _pair_layout(config.r)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("constant", constant, persistent=False)
        self._kept = Derived()
        paired = config.init_weights and not config.apply_GS and config.r % 2 == 0
        with seeded(config.init_weights_seed), torch.no_grad():
            drawn = self.hra_u.new_empty(site.inputs, config.r // 2 if paired else config.r)
            nn.init.kaiming_uniform_(drawn, a=5**0.5)
            self.hra_u.copy_(drawn.repeat_interleave(2, 1) if paired else drawn)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(in, r) each L and Z, with H_1 ... H_r = I - Z L^T."""
        wide = self.hra_u if self.hra_u.dtype == torch.float64 else self.hra_u.float()
        if self.config.apply_GS:
            basis = _orthonormal(wide)
            return 2 * basis, basis
        basis = wide / wide.norm(dim=0)
        whole = basis.shape[1] // 2 * 2
        first, second = basis[:, :whole].reshape(len(basis), -1, 2).unbind(2)
        parts = [torch.stack((first, second - first), 2).flatten(1), basis[:, whole:]]
        basis = torch.cat(parts, 1) if len(wide.T) > whole else parts[0]
        middle = torch.addcmul(self.constant.to(wide.dtype), self.mask.to(wide.dtype), basis.T @ basis)
        return basis @ torch.linalg.inv(middle).T, basis

    def _update(self) -> tuple[Tensor, Tensor]:
        """(r, in) and (out, r) the change of the weight, as down and up."""
        left, basis = (factor.to(self.hra_u.dtype) for factor in self.factors())
        return left.T, -(self.site.weight.to(basis.dtype) @ basis)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        down, up = self._kept.get("update", [self.hra_u, self.site.stored], self._update)
        return plus_low_rank(signal, signal.x.to(down.dtype), down, up, 1.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W H_1 ... H_r."""
        left, basis = self.factors()
        return (weight - (self.site.weight.to(basis.dtype) @ basis) @ left.T).to(weight.dtype)


def _pair_layout(rank: int) -> tuple[Tensor, Tensor]:
    """(r, r) each M and C, so that K = C + M * Z^T Z; the last column is by itself where r is odd.

    A pair of reflections, with d = v_2 - v_1, has the 2 x 2 block [[1/2, (1 - |d|^2) / 2], [-1/2, |d|^2 / 2]], where
    v_1 . d = -|d|^2 / 2. Above the blocks is Z^T Z itself, as in the compact form of a product of reflections.
    """
    pair = torch.arange(rank) // 2
    mask = (pair[:, None] < pair[None, :]).float()
    constant = torch.eye(rank) / 2
    for start in range(0, rank - 1, 2):
        block = slice(start, start + 2)
        mask[block, block] = torch.tensor([[0.0, 1.0], [0.0, 0.5]])
        constant[block, block] = torch.tensor([[0.5, 0.5], [-0.5, 0.0]])
    return mask, constant


def _orthonormal(directions: Tensor) -> Tensor:
    """The directions (in, r), each without its part along those before it, and of length 1."""
    basis, triangle = torch.linalg.qr(directions)
    orthonormal: Tensor = basis * triangle.diagonal().sign()
    return orthonormal
