"""LoKr: the Kronecker product of two small matrices."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..configuration.checks import check_choice, is_integer
from ..configuration.registry import register_architecture, register_config
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearUpdate
from .lycoris import LycorisConfig, initialise, output_mask


@dataclass(eq=False)
class LoKrConfig(LycorisConfig):
    """Changes of linear maps that are Kronecker products. Yeh et al. 2024 (LyCORIS), arXiv:2309.14859.

    ``decompose_factor`` is the wanted width of the first matrix; -1 makes both matrices as square as the widths of the
    map allow. The second matrix has rank ``r`` where that is less than half of its larger side; with ``decompose_both``
    the first one too. ``init_weights``: ``"identity"`` (the first matrix is zero), ``"lycoris"`` (the second is) or
    ``"random"``. ``rank_dropout_scale`` enlarges what rank_dropout leaves. The other fields are those of
    ``LinearMethodConfig`` and ``LycorisConfig``; ``dropout`` is that of the change's input.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "lokr"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_integer(self.decompose_factor) or (self.decompose_factor < 1 and self.decompose_factor != -1):
            raise self.refusal("decompose_factor", "out of range", "it must be an integer >= 1, or -1")
        check_choice(self, "init_weights", ("identity", "lycoris", "random"))


register_architecture("lokr", LoKrConfig)
register_config("lokr", LoKrConfig())


def factor_pair(width: int, wanted: int) -> tuple[int, int]:
    """Two factors of `width`: (wanted, the rest) if that divides it, else the smaller first, as large as possible.

    wanted: bounds the first factor; -1 for no bound.

    Example:
        >>> factor_pair(128, -1), factor_pair(128, 4), factor_pair(127, -1)
        ((8, 16), (4, 32), (1, 127))
    """
    if wanted > 0 and width % wanted == 0:
        return wanted, width // wanted
    bound = min(int(width**0.5), width if wanted == -1 else wanted)
    first = next(factor for factor in range(bound, 0, -1) if width % factor == 0)
    return first, width // first


@register(LoKrConfig, LinearSite)
class LoKr(LinearUpdate):
    """y = Wx + (alpha / r) (W₁ ⊗ W₂) x

    The Kronecker product of W₁ (out₁, in₁) and W₂ (out₂, in₂), where out₁ out₂ = out and in₁ in₂ = in. Each may be a
    product of two matrices of rank r. Yeh et al. 2024, arXiv:2309.14859, section 3. Applied as two small
    products.

    Site: LinearSite. Parameters: lokr_w1 (out₁, in₁), or lokr_w1_a (out₁, r) and lokr_w1_b (r, in₁); the same for w2.
    Their number is out₁ in₁ + out₂ in₂, where a product has r (outᵢ + inᵢ) in the place of outᵢ inᵢ.
    Start: identity (W₁ = 0, or W₂ = 0 with "lycoris") unless ``init_weights="random"``. Merges: yes.
    """

    changes_weight = False

    def __init__(self, config: LoKrConfig, site: LinearSite, shared: Any = None) -> None:
        super().__init__(config)
        self.config, self.scale = config, config.alpha / config.r
        outputs, inputs = (factor_pair(width, config.decompose_factor) for width in (site.outputs, site.inputs))
        self.products: dict[str, bool] = {}
        with seeded(config.init_weights_seed):
            for which, allowed in ((0, config.decompose_both), (1, True)):
                zero = config.init_weights == ("identity", "lycoris")[which]
                self._add(f"lokr_w{which + 1}", outputs[which], inputs[which], allowed, zero)

    def _add(self, name: str, outputs: int, inputs: int, allowed: bool, zero: bool) -> None:
        rank = self.config.r
        self.products[name] = allowed and rank < max(outputs, inputs) / 2
        if not self.products[name]:
            self.register_parameter(name, self.new(outputs, inputs))
            initialise(self.get_parameter(name), zero)
            return
        first = name == "lokr_w1"  # either factor may be the one that is zero; PEFT's choice
        for suffix, shape, starts in (("a", (outputs, rank), first), ("b", (rank, inputs), not first)):
            self.register_parameter(f"{name}_{suffix}", self.new(*shape))
            initialise(self.get_parameter(f"{name}_{suffix}"), zero and starts)

    def _matrix(self, name: str) -> Tensor:
        if self.products[name]:
            return self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")
        return self.get_parameter(name)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        return self._matrix("lokr_w1") * self.scale, self._matrix("lokr_w2")

    def delta(self) -> Tensor:
        """See the base."""
        return torch.kron(*self._matrices())

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        first, second = self._kept.get("matrices", self.sources(), self._matrices)
        output = signal.output
        x = self.dropped(signal.x).to(second.dtype).reshape(-1, first.shape[1], second.shape[1])  # (n, in1, in2)
        wide = linear(x.transpose(0, 1), second).flatten(1)  # (in1, n out2): both are one product each
        change = (first @ wide).view(len(first), *output.shape[:-1], -1).movedim(0, -2)  # (b, s, out1, out2)
        if self.training and (self.config.rank_dropout > 0 or self.config.module_dropout > 0):
            mask = output_mask(self.config, output.shape[-1], change, self.config.rank_dropout_scale)
            change = change * mask.view(change.shape[-2:])
        split, change = output.view(change.shape), change.to(output.dtype)
        if signal.owned and not torch.compiler.is_compiling():
            split.add_(change)
            return signal
        return signal.giving((split + change).flatten(-2))
