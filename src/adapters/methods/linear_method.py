"""What methods that change a linear map have in common: where they sit, and how a change of the weight is applied."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..configuration.checks import check_fraction
from ..configuration.linear import LinearMethodConfig
from ..derived import Derived
from ..method import AdapterModule
from ..signals import LinearSignal
from ..sites import LinearSite


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
        return config.includes(site.location, site.role, site.layer)

    @classmethod
    def asks_for(cls, config: LinearMethodConfig) -> set[str]:
        """The location flags that are set."""
        return config.locations()

    def new(self, *shape: int) -> nn.Parameter:
        """A parameter without values yet, of the dtype that the configuration asks for."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype))


class LinearUpdate(LinearMethod):
    """y = Wx + ΔW x, placed by a ``LinearUpdateConfig``.

    ΔW is computed once for each pass with gradients; without, it is kept until a parameter changes.
    """

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

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + ΔW."""
        return weight + self.delta().to(weight.dtype)


def plus_product(signal: LinearSignal, x: Tensor, weight: Tensor) -> LinearSignal:
    """The signal with weight (out, in) times x (b, s, in) added to its output."""
    output = signal.output
    if not output.dtype == x.dtype == weight.dtype:
        product = linear(x.to(weight.dtype), weight)
        return LinearSignal(signal.rows, signal.x, output + product.to(output.dtype))
    flat = output.flatten(0, -2)
    if signal.owned and not torch.compiler.is_compiling() and flat.data_ptr() == output.data_ptr():
        flat.addmm_(x.flatten(0, -2), weight.T)
        return signal
    return LinearSignal(signal.rows, signal.x, torch.addmm(flat, x.flatten(0, -2), weight.T).view(output.shape))
