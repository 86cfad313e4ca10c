"""What flows through a site, and the five operations that composition needs on it.

Every tensor of a signal has the batch as its first dimension; what all rows share is in the context (``context.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import CompositionError


@dataclass(frozen=True)
class Signal:
    """Base of all signals.

    rows: (batch,) which rows of the model's batch these are; None stands for all of them, in order.
    span: of a part of the sequence the positions where it begins and where its tensors here begin, which differ where a
        cache has the rest; None for the whole sequence.
    backwards: whether it runs through a composition from the last adapter to the first, each undoing what it did.
    """

    rows: Tensor | None
    span: tuple[int, int] | None = field(default=None, kw_only=True)
    backwards: ClassVar[bool] = False

    def __len__(self) -> int:
        """The number of rows."""
        return int(next(iter(self.tensors().values())).shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields, without the row numbers."""
        named = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return {name: value for name, value in named if name != "rows" and isinstance(value, Tensor)}

    @property
    def features(self) -> Tensor:
        """(b, s, d) what a gate looks at."""
        return next(iter(self.tensors().values()))

    def own(self, values: Tensor, expanded: bool) -> Tensor:
        """Of one value for each row of the model's batch those of this signal's rows.

        expanded: ``generate`` may have repeated each row in place, for its beams, so that there are too few values.
        """
        if self.rows is not None:
            return values[self.rows.to(values.device)]
        if expanded and len(values) and len(self) % len(values) == 0:
            return values.repeat_interleave(len(self) // len(values))
        return values

    def take(self, index: slice | Tensor) -> Self:
        """The given rows."""
        tensors = self.tensors()
        rows = self.rows
        if rows is None:
            first = next(iter(tensors.values()))
            rows = torch.arange(first.shape[0], device=first.device)
        changes: dict[str, Any] = {name: value[index] for name, value in tensors.items()}
        return replace(self, rows=rows[index], **changes)

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Consecutive groups of rows; sizes are plain ints, since a tensor here would break ``torch.compile``."""
        return [self.take(slice(stop - size, stop)) for size, stop in zip(sizes, accumulate(sizes), strict=True)]

    def select(self, mask: Tensor, other: Self) -> Self:
        """`other` in the rows where the mask (b,) is true, this in the rest."""

        def choose(values: list[Tensor]) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (values[0].dim() - 1)), values[1], values[0])

        return self._combine([self, other], choose)

    def positions(self) -> int:
        """The length of the sequence."""
        return int(next(iter(self.tensors().values())).shape[1])

    def window(self, start: int, stop: int) -> Self:
        """Positions [start, stop) of the sequence."""
        changes: dict[str, Any] = {name: value[:, start:stop] for name, value in self.tensors().items()}
        return replace(self, **changes)

    @classmethod
    def join(cls, parts: Sequence[Self], dim: int) -> Self:
        """The parts one after the other, along the batch (0) or the sequence (1)."""
        return cls._combine(parts, lambda values: torch.cat(values, dim))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, in order."""
        joined = cls.join(parts, 0)
        rows = [part.rows for part in parts if part.rows is not None]
        return replace(joined, rows=torch.cat(rows) if rows else None)

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """Weighted sum of the parts: sum_i w_i part_i. A weight is a number or (b, s or 1, 1)."""

        def weigh(values: list[Tensor]) -> Tensor:
            total = values[0] * weights[0]
            for value, weight in zip(values[1:], weights[1:], strict=True):
                total = total + value * weight
            return total

        return cls._combine(parts, weigh)

    @classmethod
    def _combine(cls, parts: Sequence[Self], combine: Callable[[list[Tensor]], Tensor]) -> Self:
        """One signal out of many, field by field."""
        names = parts[0].tensors()
        changes: dict[str, Any] = {name: combine([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **changes)


@dataclass(frozen=True)
class LinearSignal(Signal):
    """At a linear map W: its input x (b, s, in) and its output (b, s, out), which starts as Wx.

    owned: nobody else holds the output and no gradient is asked for, so that it may be changed in place.
    transformed: x is what the adapter's ``transform_input`` made of the map's input, and the output starts from that.
    """

    x: Tensor
    output: Tensor
    owned: bool = False
    transformed: bool = False

    def giving(self, output: Tensor) -> Self:
        """With this output, which belongs to nobody else."""
        return type(self)(self.rows, self.x, output, span=self.span)


@dataclass(frozen=True)
class HiddenSignal(Signal):
    """A sequence of hidden states (b, s, d): the output of a block or of the embeddings."""

    hidden: Tensor


@dataclass(frozen=True)
class SublayerSignal(Signal):
    """At a sub-layer's output.

    hidden: (b, s, d) the output before the residual is added; residual: (b, s, d) the residual stream;
    update: (b, s, d) what the last adapter added, for AdapterFusion;
    final: (b, s, 1) bool, where hidden already is the sub-layer's result, so that neither the residual nor the
    model's norm follows.
    """

    hidden: Tensor
    residual: Tensor
    update: Tensor | None = None
    final: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Self], dim: int) -> Self:
        """As for any signal, with the optional fields filled in where only some parts have them."""
        return super().join([part.filled(parts) for part in parts], dim)

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """As for any signal; parts that are final everywhere but not all alike have the residual taken off first."""
        finals = [part.final for part in parts]
        plain = [replace(part, final=None) for part in parts]
        if all(final is None for final in finals):
            return super().mean([part.filled(plain) for part in plain], weights)
        if all(final is not None for final in finals):
            mean = super().mean([part.filled(plain) for part in plain], weights)
            return replace(mean, final=finals[0])
        unfinished = [
            part if final is None else replace(part, hidden=part.hidden - part.residual)
            for part, final in zip(plain, finals, strict=True)
        ]
        return super().mean([part.filled(unfinished) for part in unfinished], weights)

    def select(self, mask: Tensor, other: Self) -> Self:
        """As for any signal, with the optional fields filled in where only one has them."""
        both = (self, other)
        return super(SublayerSignal, self.filled(both)).select(mask, other.filled(both))

    def filled(self, parts: Sequence[Self]) -> Self:
        """This part with zeros for the optional fields that another part has."""
        changes: dict[str, Any] = {}
        if self.update is None and any(part.update is not None for part in parts):
            changes["update"] = torch.zeros_like(self.hidden)
        if self.final is None and any(part.final is not None for part in parts):
            changes["final"] = torch.zeros_like(self.hidden[..., :1], dtype=torch.bool)
        return replace(self, **changes) if changes else self


@dataclass(frozen=True)
class PrefixSignal(Signal):
    """Keys and values that stand in front of an attention's own.

    hidden: (b, s, d) the input of the attention; key, value: (b, heads, p, head width), p = 0 at the start;
    bias: (b, s or 1, p) is added to the attention scores: 0 = seen, -inf = not seen, log w = seen with weight w; None
    stands for zeros.
    """

    hidden: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None

    def window(self, start: int, stop: int) -> Self:
        """The queries [start, stop): the prefixes stay whole."""
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, start:stop]
        return replace(self, hidden=self.hidden[:, start:stop], bias=bias)

    def with_prefix(self, key: Tensor, value: Tensor) -> Self:
        """With more keys and values (b, heads, p, head width) in front, seen by all queries."""
        bias = None if self.bias is None else pad(self.bias, (key.shape[2], 0))
        if self.key.shape[2]:
            key, value = torch.cat([key, self.key], 2), torch.cat([value, self.value], 2)
        return type(self)(self.rows, self.hidden, key, value, bias, span=self.span)

    def select(self, mask: Tensor, other: Self) -> Self:
        """As for any signal, with prefixes padded to one length."""
        longest = max(part.key.shape[2] for part in (self, other))
        queries = max(part._bias(1).shape[1] for part in (self, other))
        return super(PrefixSignal, self._padded(longest, queries)).select(mask, other._padded(longest, queries))

    @classmethod
    def join(cls, parts: Sequence[Self], dim: int) -> Self:
        """Along the batch prefixes are padded to one length; along the sequence each is seen by its own queries."""
        if dim == 1:
            return cls._join_queries(parts)
        longest = max(part.key.shape[2] for part in parts)
        if all(part.bias is None and part.key.shape[2] == longest for part in parts):
            return super().join(parts, dim)
        queries = max(part._bias(1).shape[1] for part in parts)
        return super().join([part._padded(longest, queries) for part in parts], dim)

    @classmethod
    def _join_queries(cls, parts: Sequence[Self]) -> Self:
        total, before, biases = sum(part.key.shape[2] for part in parts), 0, []
        for part in parts:
            own = part._bias(part.hidden.shape[1])
            after = total - before - own.shape[2]
            biases.append(pad(own, (before, after), value=float("-inf")))
            before += own.shape[2]
        hidden = torch.cat([part.hidden for part in parts], 1)
        return replace(cls._side_by_side(parts), hidden=hidden, bias=torch.cat(biases, 1))

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """All prefixes, each with its weight in the softmax: log w_i is added to its scores.

        Raises:
            CompositionError: a weight is negative.
        """
        queries = max(part._bias(1).shape[1] for part in parts)
        biases = []
        for part, weight in zip(parts, weights, strict=True):
            if isinstance(weight, Tensor):
                biases.append(part._bias(max(queries, weight.shape[1])) + weight.log())
            elif weight < 0:
                raise CompositionError(
                    f"Average(weights={list(weights)}): prefixes are averaged by weights of at least 0."
                )
            else:
                biases.append(part._bias(queries) + (math.log(weight) if weight else float("-inf")))
        return replace(cls._side_by_side(parts), bias=torch.cat(biases, 2))

    @classmethod
    def _side_by_side(cls, parts: Sequence[Self]) -> Self:
        key, value = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("key", "value"))
        return replace(parts[0], key=key, value=value)

    def _bias(self, queries: int) -> Tensor:
        rows, length = self.key.shape[0], self.key.shape[2]
        bias = self.key.new_zeros(1, 1, length) if self.bias is None else self.bias
        return bias.expand(rows, max(queries, bias.shape[1]), length)

    def _padded(self, length: int, queries: int) -> Self:
        missing = length - self.key.shape[2]
        key, value = (pad(tensor, (0, 0, missing, 0)) for tensor in (self.key, self.value))
        return replace(self, key=key, value=value, bias=pad(self._bias(queries), (missing, 0), value=float("-inf")))
