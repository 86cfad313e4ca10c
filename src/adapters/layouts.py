"""How prompts and an input share one sequence: the signal of prompts, and where each of the two stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import CompositionError
from .signals import Signal


class Target(NamedTuple):
    """Where a prompt goes: among the tokens or behind the embeddings module; before the input or after its first."""

    placement: str
    after_first: bool


TARGETS = (Target("tokens", True), Target("tokens", False), Target("embeddings", True), Target("embeddings", False))
"""In the order in which a pass inserts them; what comes later stands further to the left."""


@dataclass(frozen=True)
class PromptSignal(Signal):
    """The prompts for one target.

    prompt: (b, p, d), p = 0 at the start; d = 0 where only the length is asked for; seen: (b, p) bool, False where a
    row with a shorter prompt is padded; None: all is seen.
    """

    target: Target
    prompt: Tensor
    seen: Tensor | None = None

    def with_prompt(self, target: Target, length: int, embeddings: Callable[[], Tensor]) -> Self:
        """With `length` embeddings (p, d) or (b, p, d) in front, if they are for this target."""
        if target != self.target:
            return self
        rows, before, width = self.prompt.shape
        prompt = embeddings().to(self.prompt.dtype) if width else self.prompt.new_zeros(length, 0)
        prompt = prompt.expand(rows, -1, -1)
        seen = None if self.seen is None else pad(self.seen, (length, 0), value=True)
        return replace(self, prompt=torch.cat([prompt, self.prompt], 1) if before else prompt, seen=seen)

    def positions(self) -> int:
        """A prompt has no part of the sequence."""
        raise CompositionError(
            "Split: a prompt stands before the whole input, so no part of the sequence has one of its own; use Stack, "
            "Average, BatchSplit or Parallel for prompts."
        )

    @classmethod
    def join(cls, parts: Sequence[Self], dim: int) -> Self:
        """The rows of all parts; shorter prompts are padded on the left."""
        longest = max(part.prompt.shape[1] for part in parts)
        if all(part.seen is None and part.prompt.shape[1] == longest for part in parts):
            return super().join(parts, dim)
        return super().join([part._padded(longest) for part in parts], dim)

    def _padded(self, length: int) -> Self:
        missing = length - self.prompt.shape[1]
        return replace(self, prompt=pad(self.prompt, (0, 0, missing, 0)), seen=pad(self._all_seen(), (missing, 0)))

    def _all_seen(self) -> Tensor:
        shape, device = self.prompt.shape[:2], self.prompt.device
        return torch.ones(shape, dtype=torch.bool, device=device) if self.seen is None else self.seen

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """The weighted sum of prompts of one length.

        Raises:
            CompositionError: the lengths differ, of parts with a weight.
        """
        weighted = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
        parts, weights = [part for part, _ in weighted], [weight for _, weight in weighted]
        lengths = [part.prompt.shape[1] for part in parts]
        if len(set(lengths)) > 1 or any(part.seen is not None for part in parts):
            raise CompositionError(
                f"Average: prompts of different lengths, here {lengths}, have no mean (0: none at this place); average "
                "prompts of one prompt_length, combine and placement, or use Stack."
            )
        return super().mean(parts, weights)

    def aligned(self) -> Self:
        """With the padding of every row on the left."""
        if self.seen is None:
            return self
        order = torch.argsort(self.seen.int(), dim=1, stable=True)
        return replace(self, prompt=_chosen(self.prompt, order), seen=_chosen(self.seen, order))


def _chosen(values: Tensor, index: Tensor) -> Tensor:
    """(b, n, …) the values (b, m, …) at the positions (b, n) of each row."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


@dataclass(frozen=True)
class Layout:
    """How a prompt of p and the input's s positions share p + s positions.

    prompt, seen: (b, p, d) and (b, p) as in the signal, the padding of each row on the left;
    start: (b or 1, 1) the number of positions in front of the prompt, None: 0; at_end: padding stands behind the
    input, so that positions count right by themselves; else in front of all, so that the input may grow.
    """

    target: Target
    prompt: Tensor
    seen: Tensor | None
    start: Tensor | None
    at_end: bool

    @classmethod
    def of(cls, signal: PromptSignal, mask: Tensor | None, at_end: bool) -> Self:
        """The layout of a prompt in front of an input with this mask (b, s).

        Among tokens "in front" is behind the padding on the left, so that a row does not depend on its padding.
        """
        placement, after_first = signal.target
        start = None
        if mask is not None and (after_first or placement == "tokens"):
            start = mask.ne(0).int().argmax(1, keepdim=True) + int(after_first)
        elif after_first:
            start = torch.ones(1, 1, dtype=torch.long, device=signal.prompt.device)
        signal = signal.aligned()
        return cls(signal.target, signal.prompt, signal.seen, start, at_end)

    @property
    def length(self) -> int:
        """p."""
        return int(self.prompt.shape[1])

    @property
    def count(self) -> int | Tensor:
        """(b, 1) the number of embeddings that each row has."""
        return self.length if self.seen is None else self.seen.sum(1, keepdim=True)

    def _fixed(self) -> bool:
        """Whether the prompt stands in front in every row."""
        return self.start is None and (self.seen is None or not self.at_end)

    def spread(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """(b, p + s, …) from what belongs to the prompt (b, p, …) and to the tokens (b, s, …)."""
        joined = torch.cat([prompt.to(tokens), tokens], 1)
        return joined if self._fixed() else _chosen(joined, self._sources(tokens.shape[1]).expand(len(joined), -1))

    def _sources(self, tokens: int) -> Tensor:
        """(b or 1, p + s) for each position of the whole where it is in [prompt; tokens]."""
        length, count, start = self.length, self.count, 0 if self.start is None else self.start
        place = torch.arange(length + tokens, device=self.prompt.device)[None] - self._padding
        token = length + place - torch.where(place < start, 0, count)
        slot = place - start + length - count
        sources = torch.where((place >= start) & (place < start + count), slot, token)
        if self.at_end:
            return torch.where(place >= tokens + count, place - tokens - count, sources)
        return torch.where(place < 0, place + self._padding, sources)

    @property
    def _padding(self) -> int | Tensor:
        """(b, 1) the padding in front."""
        return 0 if self.at_end else self.length - self.count

    def tokens_of(self, states: Tensor) -> Tensor:
        """(b, s, …) what belongs to the tokens, of (b, p + s, …)."""
        if self._fixed():
            return states[:, self.length :]
        place = torch.arange(states.shape[1] - self.length, device=states.device)[None]
        start = 0 if self.start is None else self.start
        index = place + self._padding + torch.where(place < start, 0, self.count)
        return _chosen(states, index.expand(len(states), -1))

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """(b, p + s) the mask of the whole from that of the tokens; None, where all is seen, stays None."""
        if mask is None:
            return None
        return self.spread(mask.new_ones(len(mask), self.length) if self.seen is None else self.seen, mask)

    def positions(self, given: Tensor) -> Tensor:
        """(b, p + s) position ids of the whole from those of the tokens: the prompt moves what follows it on."""
        tokens, count = given.shape[1], self.count
        start = torch.zeros(1, 1, dtype=torch.long, device=given.device) if self.start is None else self.start
        rows = len(self.prompt)
        given, start = given.expand(rows, -1), start.expand(rows, -1)
        last = start.clamp(max=tokens - 1)
        first = given.gather(1, last) + start - last
        slots = first + torch.arange(self.length, device=given.device) - (self.length - count)
        place = torch.arange(tokens, device=given.device)[None]
        return self.spread(slots.clamp(min=0), torch.where(place < start, given, given + count))


def for_each_token(inputs: dict[str, Any], hidden: Tensor) -> dict[str, Tensor]:
    """The inputs that say something of each token (b, s, …) in whole numbers, other than what is lengthened itself."""
    apart = ("input_ids", "attention_mask", "position_ids", "labels")
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == hidden.shape[:2]
        if not value.is_floating_point() and name not in apart and not name.startswith(("encoder_", "decoder_"))
    }
