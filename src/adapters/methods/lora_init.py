"""Where a LoRA starts, if not at B = 0: the factors A0, B0 that are read off the weight which it changes.

PiSSA and OLoRA start in the weight's principal directions. As published they take s B0 A0 off the weight. Here the
weight stays as it is, and what is added is s (B A - B0 A0): zero at the start, to the bit, and W with the adapter
switched off. An ordinary LoRA of rank 2r says the same, with A' = [A; A0] and B' = [B, -B0].
"""

import re

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..method import weights_follow

FROM_WEIGHT = re.compile(r"pissa|pissa_niter_[1-9]\d*|olora")
"""The values of ``init_weights`` that read A0 and B0 off the weight."""

KEEPS_START = re.compile(rf"{FROM_WEIGHT.pattern}|lora_ga")
"""Those with which a LoRA keeps A0 and B0."""


def factors(scheme: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) for a weight (out, in).

    Raises:
        AdapterError: the weight is quantized, or the rank is above that of the weight.
    """
    if not weight.dtype.is_floating_point:
        raise AdapterError(
            f"init_weights={scheme!r}: the weight is of type {weight.dtype}; the factors are read off a weight of "
            "floating point numbers. Load the model without quantization, or use init_weights='lora'."
        )
    check_rank(scheme, rank, min(weight.shape))
    matrix = weight.detach().float()
    return _olora(matrix, rank) if scheme == "olora" else _pissa(scheme, matrix, rank, scale)


def check_rank(scheme: str, rank: int, most: int) -> None:
    """Refuse a rank for which there are not enough directions.

    Raises:
        AdapterError: it is above `most`.
    """
    if rank > most:
        raise AdapterError(f"init_weights={scheme!r} with r={rank}: there are {most} directions; r must be <= {most}.")


def _pissa(scheme: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """W ~ U S V: A0 = sqrt(S / s) V, B0 = U sqrt(S / s). Meng et al. 2024, arXiv:2404.02948, eq. 2 and 3."""
    if scheme == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=int(scheme.rpartition("_")[2]))
        right = right.T
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W = Q R: A0 = R[:r], B0 = Q[:, :r]. Büyükakyüz 2024, arXiv:2406.01775."""
    left, right = torch.linalg.qr(weight)
    return right[:rank].contiguous(), left[:, :rank].contiguous()


def initialise(matrix: Tensor, scheme: str, zero: bool) -> None:
    """Start values by ``init_weights``; zero: this is the matrix that scheme "lora" starts at 0."""
    if weights_follow():
        return
    match scheme:
        case "lora" if zero:
            nn.init.zeros_(matrix)
        case "lora":
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        case "bert":
            nn.init.normal_(matrix, std=0.02)
        case "ia3":
            nn.init.ones_(matrix)
        case _:
            nn.init.kaiming_uniform_(matrix)
