"""ReFT: changes of the hidden states of some positions, in a low-rank subspace."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ..blocks import BlockSignal, BlockSite
from ..configuration.base import LATER, AdapterConfig
from ..configuration.checks import (
    check_activation,
    check_dtype,
    check_fraction,
    check_integer,
    check_layers,
)
from ..configuration.registry import register_architecture, register_config, register_preset
from ..context import current
from ..derived import Derived
from ..errors import AdapterError
from ..method import AdapterModule, activation, register, seeded


@dataclass(eq=False)
class ReftConfig(AdapterConfig):
    """Low-rank changes of hidden states. Wu et al. 2024, arXiv:2404.03592.

    They act after each of the ``layers`` (``"all"`` or a list) that is not in ``leave_out``, on the first
    ``prefix_positions`` and the last ``suffix_positions`` tokens, which share one change if ``tied_weights``.
    ``orthogonality`` keeps the rows of the projection orthonormal; ``subtract_projection`` takes the projected state
    away before the new one is added.

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
    leave_out: list[int] = field(default_factory=list, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != "all":
            check_layers(self, "layers")
        check_layers(self, "leave_out")
        check_integer(self, "prefix_positions", least=0)
        check_integer(self, "suffix_positions", least=0)
        if not self.prefix_positions + self.suffix_positions:
            wrong = "too few, with prefix_positions=0"
            raise self.refusal("suffix_positions", wrong, "no position would change; one of them must be at least 1")
        check_integer(self, "r", least=1)
        check_fraction(self, "dropout")
        if self.non_linearity is not None:
            check_activation(self, "non_linearity")
        check_dtype(self, "dtype")

    def check_sites(self, sites: Sequence[Any]) -> None:
        """Refuse numbers in ``layers`` that no block of the model has."""
        known = {site.layer for site in sites}
        unknown = [] if self.layers == "all" else [layer for layer in self.layers if layer not in known]
        if unknown and known:
            raise AdapterError(
                f"add_adapter({type(self).__name__}(layers={self.layers})): the model has no layer {unknown[0]}; its "
                f"layers are 0 to {max(known)}."
            )


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


class Rotation(nn.Module):
    """R (r, d) with orthonormal rows, of any matrix (r, d) of full rank, whose size does not matter."""

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        self.original = nn.Parameter(orthonormal(original))
        self._derived = Derived()

    @property
    def weight(self) -> Tensor:
        """R."""
        return self._derived.get("weight", [self.original], lambda: orthonormal(self.original))


class ReftUnit(nn.Module):
    """h' = h + Rᵀ(act(Wh + b) - Rh): one change of hidden states (k, d), of rank r.

    learned_source: W (r, d) and b (r,); projection: R (r, d).
    """

    def __init__(self, config: ReftConfig, width: int) -> None:
        super().__init__()
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self.subtract, self.dropout = config.subtract_projection, config.dropout
        self.non_linearity = None if config.non_linearity is None else activation(config.non_linearity)
        with seeded(config.init_weights_seed):
            self.learned_source = nn.Linear(width, config.r, dtype=dtype)
            projection = nn.Linear(width, config.r, bias=False, dtype=dtype)
        self.projection = Rotation(projection.weight.detach()) if config.orthogonality else projection

    def forward(self, hidden: Tensor) -> Tensor:
        """h' - h."""
        weight, bias, rotation = self.learned_source.weight, self.learned_source.bias, self.projection.weight
        x = hidden.to(weight.dtype)
        if self.non_linearity is None:
            source = linear(x, weight - rotation if self.subtract else weight, bias)
        else:
            source = self.non_linearity(linear(x, weight, bias))
            source = source - linear(x, rotation) if self.subtract else source
        change = (source @ rotation).to(hidden.dtype)
        if self.dropout and self.training:
            return dropout(hidden + change, self.dropout) - hidden
        return change


def orthonormal(weight: Tensor) -> Tensor:
    """The rows of (r, d) after Gram-Schmidt, in float32 at least; orthonormal rows stay as they are."""
    precise = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    basis, triangle = torch.linalg.qr(precise.T)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    rows: Tensor = (basis * signs).T.contiguous()
    return rows.to(weight.dtype)


@register(ReftConfig, BlockSite)
class Reft(AdapterModule[BlockSignal]):
    """h' = h + Rᵀ(Wh + b - Rh) at the first p and the last q real tokens of each row

    A change of the output of a block in the space of r directions: LoReFT, eq. 2 of Wu et al. 2024, arXiv:2404.03592.
    NoReFT has no constraint on R; DiReFT, eq. 3, has h + Rᵀ(Wh + b). ``dropout`` acts on the whole of h'. Both changes
    see the block's own output; where first and last overlap, that of the last is made.

    In ``generate`` the first p tokens are those of the whole sequence, the last q those of the prompt: a token is
    changed in the pass that it comes in or never, so a cache makes no difference.

    Site: BlockSite. Parameters, for first and last or for both together (``tied_weights``): learned_source (r, d) and
    (r,), projection (r, d); with ``orthogonality`` R is what Gram-Schmidt makes of projection.original.
    Start: not the identity. Merges: no.
    Differs from 1.x: composes; follows the model's mode; each stack of an encoder-decoder has its own positions; R
    does not collapse under weight decay.
    """

    container = "refts"

    def __init__(self, config: ReftConfig, site: BlockSite, shared: nn.Module | None = None) -> None:
        super().__init__()
        if config.orthogonality and config.r > site.width:
            raise AdapterError(
                f"add_adapter({type(config).__name__}(r={config.r})): hidden states of {site.layer_path} have "
                f"{site.width} dimensions; with orthogonality r can be {site.width} at most."
            )
        self.first, self.last = config.prefix_positions, config.suffix_positions
        count = 1 if config.tied_weights else 2
        self.units = nn.ModuleList([ReftUnit(config, site.width) for _ in range(count)])
        used = (self.first or self.last,) if config.tied_weights else (self.first, self.last)
        for unit, positions in zip(self.units, used, strict=True):
            if not positions:
                _set_aside(unit)

    @classmethod
    def wants(cls, config: ReftConfig, site: BlockSite) -> bool:
        """After the blocks that ``layers`` names."""
        named = config.layers == "all" or site.layer in config.layers
        return config.output_reft and named and site.layer not in config.leave_out

    def forward(self, signal: BlockSignal) -> BlockSignal:
        """See the class."""
        first, last = self._positions(signal)
        units = [self.units[0], self.units[-1]]
        if len(self.units) == 1 and first is not None and last is not None:
            first, last = _both(first, last), None
        parts = [(unit, *found) for unit, found in zip(units, (first, last), strict=True) if found is not None]
        if not parts:
            return signal
        hidden = signal.hidden
        flat = hidden.reshape(-1, hidden.shape[-1])
        changes = [torch.where(meant, unit(flat[index]), 0) for unit, index, meant in parts]
        change = changes[0] if len(changes) == 1 else torch.cat(changes)
        index = parts[0][1] if len(parts) == 1 else torch.cat([part[1] for part in parts])
        changed = flat.index_add(0, index, change)
        # A block that returns a view would lose FSDP's hooks if the model changed it in place.
        return replace(signal, hidden=torch.ops.aten._unsafe_view(changed, hidden.shape))

    def _positions(self, signal: BlockSignal) -> "tuple[Chosen | None, Chosen | None]":
        forward = current()
        if forward is None or signal.rows is not None:
            return self._chosen(signal)
        # The tensor is kept beside what follows from it, so that no other one gets its id.
        key = (Reft, id(signal.before), id(signal.after), self.first, self.last)
        return forward.once(key, lambda: (self._chosen(signal), signal))[0]

    def _chosen(self, signal: BlockSignal) -> "tuple[Chosen | None, Chosen | None]":
        first = _nearest(signal.before, self.first)
        last = _nearest(signal.after, self.last)
        if first is not None and last is not None:
            index, meant = first
            first = index, meant & (signal.after.reshape(-1)[index] >= self.last)[:, None]
        return first, last


Chosen = tuple[Tensor, Tensor]
"""Positions (k,) in the rows put end to end, and (k, 1) which of them are meant."""


def _nearest(counts: Tensor, number: int) -> Chosen | None:
    """The positions whose counts (b, s) are below `number`; None if there are none."""
    if not number:
        return None
    rows, length = counts.shape
    count, column = counts.topk(min(number, length), 1, largest=False)
    meant, forward = count < number, current()
    decoding = forward is not None and isinstance(forward.past, int) and forward.past > 0
    if decoding and not torch.compiler.is_compiling() and not meant.any():
        return None
    start = length * torch.arange(rows, device=column.device)
    return (start[:, None] + column).reshape(-1), meant.reshape(-1, 1)


def _both(first: Chosen, last: Chosen) -> Chosen:
    return torch.cat([first[0], last[0]]), torch.cat([first[1], last[1]])


def _set_aside(unit: nn.Module) -> None:
    """Make a unit that changes no position untrained: 1.x has it, so files have, but no gradient would reach it."""
    for module in list(unit.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
