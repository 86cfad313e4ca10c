"""LoHa: the Hadamard product of two low-rank matrices."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..configuration.checks import check_choice
from ..configuration.registry import register_architecture, register_config
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearUpdate
from .lycoris import LycorisConfig, initialise, output_mask
from .products import plus_low_rank, plus_product


@dataclass(eq=False)
class LoHaConfig(LycorisConfig):
    """Changes of linear maps whose rank is up to r². Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098.

    ``init_weights``: ``"identity"`` starts as the unchanged model, ``"random"`` does not. The other fields are those of
    ``LinearMethodConfig`` and ``LycorisConfig``; ``dropout`` is that of the change's input.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "loha"
    init_weights: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "init_weights", ("identity", "random"))


register_architecture("loha", LoHaConfig)
register_config("loha", LoHaConfig())


@register(LoHaConfig, LinearSite)
class LoHa(LinearUpdate):
    """y = Wx + (alpha / r) (A₁ B₁ ∘ A₂ B₂) x

    The product, entry by entry, of two low-rank matrices; its rank is up to r². Hyeon-Woo et al. 2022,
    arXiv:2108.06098, proposition 1. With the r² products of columns of A₁ and A₂, and of rows of B₁ and B₂, it is a
    product of two matrices as well; where these are smaller than ΔW, it is never formed.

    Site: LinearSite. Parameters, 2 r (in + out): hada_w1_a, hada_w2_a (out, r), hada_w1_b, hada_w2_b (r, in).
    Start: identity (B₂ = 0) unless ``init_weights="random"``. Merges: yes.
    """

    def __init__(self, config: LoHaConfig, site: LinearSite, shared: Any = None) -> None:
        super().__init__(config)
        self.config, self.scale = config, config.alpha / config.r
        self.hada_w1_a, self.hada_w1_b = self.new(site.outputs, config.r), self.new(config.r, site.inputs)
        self.hada_w2_a, self.hada_w2_b = self.new(site.outputs, config.r), self.new(config.r, site.inputs)
        with seeded(config.init_weights_seed):
            for matrix in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
                initialise(matrix, zero=False)
            initialise(self.hada_w2_b, zero=config.init_weights == "identity")
        self.narrow = config.r**2 * (site.inputs + site.outputs) < site.inputs * site.outputs

    def delta(self) -> Tensor:
        """See the base."""
        return (self.hada_w1_a * self.scale @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(r², in) and (out, r²), whose product is ΔW."""
        down = self.hada_w1_b[:, None] * self.hada_w2_b[None]
        up = (self.hada_w1_a * self.scale)[:, :, None] * self.hada_w2_a[:, None]
        return down.flatten(0, 1), up.flatten(1)

    @property
    def _dropping(self) -> bool:
        return self.training and (self.config.rank_dropout > 0 or self.config.module_dropout > 0)

    @property
    def replaces_weight(self) -> bool:
        """Where ΔW is formed and nothing is dropped."""
        return super().replaces_weight and not self.narrow and not self._dropping

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        dropping = self._dropping
        x = self.dropped(signal.x).to(self.hada_w1_a.dtype)
        outputs = len(self.hada_w1_a)
        if self.narrow:
            down, up = self._kept.get("factors", self.sources(), self.factors)
            if dropping:
                up = up * output_mask(self.config, outputs, up, True)[:, None]
            return plus_low_rank(signal, x, down, up, 1.0)
        delta = self._kept.get("delta", self.sources(), self.delta)
        if dropping:
            delta = delta * output_mask(self.config, outputs, delta, True)[:, None]
        return plus_product(signal, x, delta)
