"""ReFT: changes of the hidden states of some positions, in a low-rank subspace."""

from dataclasses import dataclass

from ..configuration.base import AdapterConfig
from ..configuration.checks import (
    check_activation,
    check_dtype,
    check_fraction,
    check_integer,
    check_layers,
)
from ..configuration.registry import register_architecture, register_config, register_preset


@dataclass(eq=False)
class ReftConfig(AdapterConfig):
    """Low-rank changes of hidden states. Wu et al. 2024, arXiv:2404.03592.

    They act after each of the ``layers`` (``"all"`` or a list), on the first ``prefix_positions`` and the last
    ``suffix_positions`` tokens, which share one change if ``tied_weights``. ``orthogonality`` keeps the rows of the
    projection orthonormal; ``subtract_projection`` takes the projected state away before the new one is added.

    Raises:
        ConfigError: a field is unknown or missing, or its value is not allowed.
    """

    layers: str | list[int]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    architecture: str | None = "reft"
    output_reft: bool = True
    init_weights_seed: int | None = None
    subtract_projection: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != "all":
            check_layers(self, "layers")
        check_integer(self, "prefix_positions", least=0)
        check_integer(self, "suffix_positions", least=0)
        check_integer(self, "r", least=1)
        check_fraction(self, "dropout")
        if self.non_linearity is not None:
            check_activation(self, "non_linearity")
        check_dtype(self, "dtype")


@dataclass(eq=False)
class LoReftConfig(ReftConfig):
    """h + Rᵀ(Wh + b - Rh) with orthonormal rows of R."""

    layers: str | list[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = True


@dataclass(eq=False)
class NoReftConfig(ReftConfig):
    """LoReFT without the constraint on R."""

    layers: str | list[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = False


@dataclass(eq=False)
class DiReftConfig(ReftConfig):
    """h + Rᵀ(Wh + b): NoReFT that does not subtract the projected state."""

    layers: str | list[int] = "all"
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool = False
    subtract_projection: bool = False


register_architecture("reft", ReftConfig)
register_preset(LoReftConfig, ReftConfig, lambda config: config.orthogonality and config.subtract_projection)
register_preset(NoReftConfig, ReftConfig, lambda config: not config.orthogonality and config.subtract_projection)
register_preset(DiReftConfig, ReftConfig, lambda config: not config.orthogonality and not config.subtract_projection)
register_config("loreft", LoReftConfig())
register_config("noreft", NoReftConfig())
register_config("direft", DiReftConfig())
