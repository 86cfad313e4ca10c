"""RandLoRA: a change of full rank, a learned weighting of random matrices that all layers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from ..configuration.checks import check_choice, check_integer, check_number, is_integer
from ..configuration.registry import register_architecture, register_config
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearUpdateConfig, LowRankUpdate
from .products import plus_product

BASES = ("dense", "sparse", "very_sparse")


@dataclass(eq=False)
class RandLoRAConfig(LinearUpdateConfig):
    """Learned weights of shared random matrices of rank ``r``. Albert et al. 2025, arXiv:2502.00987.

    A smaller ``r`` means more parameters. The change is scaled by ``alpha / r``. ``bases``: ``"dense"``, ``"sparse"``
    (entries -1, 0 and 1, two thirds are zero) or ``"very_sparse"`` (all but 1 / √d of them), drawn with
    ``projection_prng_key``; ``save_projection`` puts them into the files, else they are drawn again. The other fields
    are those of ``LinearMethodConfig``; ``dropout`` is that of the change's input.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "randlora"
    r: int = 32
    alpha: float = 640
    bases: str = "dense"
    projection_prng_key: int = 0
    save_projection: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "r", least=1)
        check_number(self, "alpha")
        check_choice(self, "bases", BASES)
        if not is_integer(self.projection_prng_key):
            raise self.refusal("projection_prng_key", "no seed", "it must be an integer")


register_architecture("randlora", RandLoRAConfig)
register_config("randlora", RandLoRAConfig())


class RandomBases(nn.Module):
    """The random matrices of one adapter, large enough for its largest map; every map uses their first entries.

    randlora_A (r, d), randlora_B (D, N r): d and D are the largest of the smaller and of the larger widths.
    """

    randlora_A: Tensor
    randlora_B: Tensor

    changes_weight = True

    def __init__(self, config: RandLoRAConfig, sites: Sequence[LinearSite]) -> None:
        super().__init__()
        narrow = max(min(site.inputs, site.outputs) for site in sites)
        wide = max(max(site.inputs, site.outputs) for site in sites)
        source = torch.Generator().manual_seed(config.projection_prng_key)
        sparsity = {"dense": 0.0, "sparse": 3.0, "very_sparse": narrow**0.5}[config.bases]
        for name, shape in (
            ("randlora_A", (config.r, narrow)),
            ("randlora_B", (wide, ceil(narrow / config.r) * config.r)),
        ):
            matrix = torch.rand(shape, generator=source)
            if sparsity:
                matrix = (matrix > 1 - 0.5 / sparsity).float() - (matrix < 0.5 / sparsity).float()
            else:
                matrix = 2 * matrix - 1
            deviation = matrix.square().mean().sqrt().clamp(min=torch.finfo(matrix.dtype).tiny)
            self.register_buffer(name, matrix / deviation, persistent=config.save_projection)


@register(RandLoRAConfig, LinearSite)
class RandLoRA(LowRankUpdate):
    """y = Wx + (alpha / r) Σ_{n=1..N} B_n Λ_n A Γ_n x

    A (r, in) and B_n (out, r) are random and the same for all maps, Λ_n and Γ_n diagonal and learned; with N =
    in / r the sum has full rank. Where out < in, the transposes. Albert et al. 2025, arXiv:2502.00987, section 4.

    Site: LinearSite. Parameters, for d = min(in, out) and N = ⌈d / r⌉: randlora_lambda (r, N), randlora_gamma (N, d).
    Start: identity (Λ = 0). Merges: yes.
    """

    changes_weight = True

    def __init__(self, config: RandLoRAConfig, site: LinearSite, shared: RandomBases) -> None:
        super().__init__(config)
        self._bases, self.scale = (shared,), config.alpha / config.r  # the bases are registered once, not here
        self.narrow, self.wide = sorted((site.inputs, site.outputs))
        self.widening = site.inputs == self.narrow
        count = ceil(self.narrow / config.r)
        self.randlora_lambda, self.randlora_gamma = self.new(config.r, count), self.new(count, self.narrow)
        with seeded(config.init_weights_seed):
            nn.init.zeros_(self.randlora_lambda)
            nn.init.constant_(self.randlora_gamma, 1 / max(self.randlora_gamma.shape))

    @classmethod
    def share(cls, config: RandLoRAConfig, sites: Sequence[LinearSite]) -> RandomBases:
        """The random matrices."""
        return RandomBases(config, sites)

    def sources(self) -> list[Tensor]:
        """See the base."""
        (bases,) = self._bases
        return [self.randlora_lambda, self.randlora_gamma, bases.randlora_A, bases.randlora_B]

    def factors(self) -> tuple[Tensor, Tensor]:
        """See the base; the inner width is N r."""
        (bases,) = self._bases
        weights, dtype = self.randlora_lambda * self.scale, self.randlora_lambda.dtype
        base = bases.randlora_A[:, : self.narrow].to(dtype)
        weighted = (weights[:, :, None] * base[:, None] * self.randlora_gamma).flatten(0, 1)  # (r N, narrow)
        fixed = bases.randlora_B[: self.wide, : weights.numel()].to(dtype)  # (wide, N r), columns in any order
        return (weighted, fixed) if self.widening else (fixed.T, weighted.T)

    @property
    def _tracked(self) -> bool:
        return torch.is_grad_enabled() and self.randlora_lambda.requires_grad

    @property
    def replaces_weight(self) -> bool:
        """Without gradients, when ΔW is kept, and as long as nothing of the input is dropped."""
        return super().replaces_weight and not self._tracked

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        if self._tracked and self._narrow_is_cheaper(signal.x.shape[:-1].numel()):
            return super().forward(signal)
        delta = self._kept.get("delta", self.sources(), self.delta)
        return plus_product(signal, self.dropped(signal.x).to(delta.dtype), delta)

    def _narrow_is_cheaper(self, rows: int) -> bool:
        """Whether two products in a training step cost less than forming ΔW and one, N r being about d.

        Forward and backward take rows d (3 d + 2 D) multiplications in factors, as no gradient of the fixed one is
        needed, and D d (3 rows + 2 d) as one matrix.
        """
        return rows * (3 * self.narrow - self.wide) < 2 * self.wide * self.narrow
