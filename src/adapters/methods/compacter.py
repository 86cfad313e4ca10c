"""Compacter: bottlenecks whose projections are sums of Kronecker products."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..configuration.registry import register_config
from .bottleneck import DoubleSeqBnConfig, SeqBnConfig


@dataclass(eq=False)
class CompacterPlusPlusConfig(SeqBnConfig):
    """Compacter after the feed-forward block only. Mahabadi et al. 2021, arXiv:2106.04647."""

    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str = "gelu"
    phm_layer: bool = True


@dataclass(eq=False)
class CompacterConfig(DoubleSeqBnConfig):
    """Compacter after the attention and after the feed-forward block. Mahabadi et al. 2021, arXiv:2106.04647."""

    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str = "gelu"
    phm_layer: bool = True


register_config("compacter", CompacterConfig())
register_config("compacter++", CompacterPlusPlusConfig())
