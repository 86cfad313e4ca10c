"""Adding a product to what a linear map has given, in the order of calls that is the fastest for its shapes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..grouping import grouped_linear, per_row
from ..signals import LinearSignal


def plus_low_rank(
    signal: LinearSignal, x: Tensor, down: Tensor, up: Tensor, scale: float, gate: Tensor | None = None
) -> LinearSignal:
    """The signal with scale * gate * up down x added, in the order of calls that is the fastest for its shapes.

    x: (b, s, in); down: (r, in); up: (out, r); gate: (b, 1).
    """
    output = signal.output
    alike = output.dtype == x.dtype == up.dtype
    if alike and gate is None and signal.owned:
        low = torch.mm(down, x.flatten(0, -2).T)  # (r, b s): with few rows half the time of (b s, r)
        return plus_matrix_product(signal, low.T, up.T, scale)
    low = linear(x, down)
    if gate is not None:
        low = low * gate[:, None]
    if alike and output.dim() == 3:
        output = torch.baddbmm(output, low, up.T.expand(low.shape[0], -1, -1), alpha=scale)
    else:
        output = output + (linear(low, up) * scale).to(output.dtype)
    return signal.giving(output)


def plus_matrix_product(signal: LinearSignal, left: Tensor, right: Tensor, scale: float = 1.0) -> LinearSignal:
    """The signal with scale * left right (b s, out) added, in place where nobody else holds the output."""
    output = signal.output
    flat = output.flatten(0, -2)
    if signal.owned and not torch.compiler.is_compiling() and flat.data_ptr() == output.data_ptr():
        flat.addmm_(left, right, alpha=scale)
        return signal
    return signal.giving(torch.addmm(flat, left, right, alpha=scale).view(output.shape))


def plus_product(signal: LinearSignal, x: Tensor, weight: Tensor) -> LinearSignal:
    """The signal with weight (out, in) times x (b, s, in) added to its output."""
    output = signal.output
    if not output.dtype == x.dtype == weight.dtype:
        product = linear(x.to(weight.dtype), weight)
        return signal.giving(output + product.to(output.dtype))
    return plus_matrix_product(signal, x.flatten(0, -2), weight.T)


def plus_change_of_input(
    signal: LinearSignal, weigh: Callable[[Tensor], Tensor], transform: Callable[[Tensor], Tensor]
) -> LinearSignal:
    """The signal with W (transform(x) - x) added, where weigh gives W x; unchanged if its output is W transform(x)."""
    if signal.transformed:
        return signal
    change = weigh(transform(signal.x) - signal.x)
    return signal.giving(signal.output + change)


def plus_low_rank_by_row(
    signal: LinearSignal, x: Tensor, down: Tensor, up: Tensor, scales: Sequence[float], index: Tensor | None
) -> LinearSignal:
    """The signal with scale up down x added, each row's own of n: down (n, r, in), up (n, out, r); see ``grouped``."""
    low = grouped_linear(x, down, index)
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    if len(set(scales)) > 1:
        factors = torch.tensor(scales, dtype=low.dtype, device=low.device)[:, None, None]
        low = low * per_row(factors, index, len(low))
    if low.dtype == signal.output.dtype:
        return signal.giving(grouped_linear(low, up, index, onto=signal.output, scale=scale))
    return signal.giving(signal.output + (grouped_linear(low, up, index) * scale).to(signal.output.dtype))
