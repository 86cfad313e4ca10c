"""What methods that change a linear map have in common: where they sit, and how a change of the weight is applied."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..configuration.base import LATER, AdapterConfig
from ..configuration.checks import check_dtype, check_fraction, check_layers, check_letters
from ..derived import Derived
from ..method import AdapterModule
from ..signals import LinearSignal
from ..sites import LinearSite
from .patterns import ATTENTION_MATRICES, asked_locations, check_targets, check_targets_used, is_placed
from .products import plus_low_rank, plus_product


@dataclass(eq=False)
class LinearMethodConfig(AdapterConfig):
    """The linear maps that a method changes, by the names that ``LoRAConfig`` has for them.

    ``selfattn_lora``: the projections of every attention that ``attn_matrices`` names (q, k, v and o, the output);
    ``intermediate_lora`` and ``output_lora``: the first and the second map of the feed-forward block; in all layers
    but those in ``leave_out``; or else, in place of these flags, the modules that ``target_modules`` names, by ends of
    their paths, a regular expression or "all-linear". ``dtype`` is the name of the torch dtype of the new parameters;
    None is the model's.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = None
    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: list[int] = field(default_factory=list)
    attn_matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    init_weights_seed: int | None = None
    dtype: str | None = None
    target_modules: str | list[str] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "leave_out")
        check_letters(self, "attn_matrices", ATTENTION_MATRICES)
        check_dtype(self, "dtype")
        check_targets(self, "target_modules")

    def check_sites(self, sites: Sequence[Any]) -> None:
        """Every entry of ``target_modules`` fits one of the sites."""
        check_targets_used(self, "target_modules", sites)


@dataclass(eq=False)
class LinearUpdateConfig(LinearMethodConfig):
    """The same, for methods that add a change to a linear map; ``dropout`` is that of the change's input."""

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self, "dropout")


class LinearMethod(AdapterModule[LinearSignal]):
    """A module at a linear map, placed by a ``LinearMethodConfig``."""

    container = "linear_adapters"

    def __init__(self, config: LinearMethodConfig) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None if config.dtype is None else getattr(torch, config.dtype)

    @classmethod
    def wants(cls, config: LinearMethodConfig, site: LinearSite) -> bool:
        """At the projections that the configuration's flags and ``attn_matrices`` name."""
        return is_placed(config, site)

    @classmethod
    def asks_for(cls, config: LinearMethodConfig) -> set[str]:
        """The location flags that are set."""
        return asked_locations(config, LinearSite)

    def new(self, *shape: int) -> nn.Parameter:
        """A parameter without values yet, of the dtype that the configuration asks for."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype))


class LinearUpdate(LinearMethod):
    """y = Wx + ΔW x, placed by a ``LinearUpdateConfig``.

    ΔW is computed once for each pass with gradients; without, it is kept until a parameter changes.
    """

    changes_weight = True

    def __init__(self, config: LinearUpdateConfig) -> None:
        super().__init__(config)
        self.dropout = config.dropout
        self._kept = Derived()

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW (out, in)."""

    def sources(self) -> list[Tensor]:
        """The tensors that ΔW is computed from."""
        return list(self.parameters())

    def dropped(self, x: Tensor) -> Tensor:
        """The input x of the change, after dropout."""
        return dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        return plus_product(signal, self.dropped(signal.x), self._kept.get("delta", self.sources(), self.delta))

    @property
    def replaces_weight(self) -> bool:
        """As long as nothing of the input is dropped."""
        return not (self.dropout and self.training)

    def replaced_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW, kept as ΔW is."""
        return self._kept.get("weight", [weight, *self.sources()], lambda: self.merged_weight(weight))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW."""
        return weight + self.delta().to(weight.dtype)


class LowRankUpdate(LinearUpdate):
    """y = Wx + up (down x): a change that is applied in two narrow products."""

    changes_weight = False

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """down (k, in) and up (out, k)."""

    def delta(self) -> Tensor:
        """See the base."""
        down, up = self.factors()
        return up @ down

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        down, up = self._kept.get("factors", self.sources(), self.factors)
        return plus_low_rank(signal, self.dropped(signal.x).to(down.dtype), down, up, 1.0)
