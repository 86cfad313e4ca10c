"""What LoHa and LoKr have in common: rank, scaling and two kinds of dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..configuration.checks import check_fraction, check_integer, check_number
from .linear_method import LinearUpdateConfig


@dataclass(eq=False)
class LycorisConfig(LinearUpdateConfig):
    """The fields of LoHaConfig and LoKrConfig.

    The change is scaled by ``alpha / r``. ``rank_dropout`` is the share of a map's outputs that the change leaves alone
    in one training step, ``module_dropout`` the probability that it leaves all of them alone.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "r", least=1)
        check_number(self, "alpha")
        check_fraction(self, "rank_dropout")
        check_fraction(self, "module_dropout")


def output_mask(config: LycorisConfig, outputs: int, like: Tensor, rescaled: bool) -> Tensor:
    """(out,) by what the change of each output is multiplied in one training step.

    rescaled: the outputs that are left are enlarged, so that the mean of the mask is one.
    """
    mask = torch.ones(outputs, device=like.device, dtype=like.dtype)
    if config.rank_dropout:
        mask = (torch.rand_like(mask) >= config.rank_dropout).to(like.dtype)
        if rescaled:
            mask = mask / mask.mean().clamp(min=1 / outputs)  # where nothing is left there is nothing to enlarge
    if config.module_dropout:
        mask = mask * (torch.rand_like(mask[:1]) >= config.module_dropout)
    return mask


def initialise(matrix: nn.Parameter, zero: bool) -> None:
    """Zeros, or He's uniform distribution as LoRA's lora_A has it."""
    if zero:
        nn.init.zeros_(matrix)
    else:
        nn.init.kaiming_uniform_(matrix, a=5**0.5)
