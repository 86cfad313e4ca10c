"""The site of methods that change the output of a whole block, at some positions of the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from .context import Forward, current
from .evaluation import evaluate
from .signals import HiddenSignal
from .sites import Place, Site
from .topology import Anatomy

FAR = 2**30
"""The distance of a position that is no token, or none of the prompt's."""


@dataclass(frozen=True)
class BlockSignal(HiddenSignal):
    """The output of a block, and where each position is among the real tokens of its row.

    before, after: (b, s) the number of real tokens in front of it and behind it; FAR where it is padding. With a cache
    the tokens of former passes count. In ``generate`` what comes after is counted to the end of the prompt, and is
    FAR behind it, so that a token's counts are the same in every pass.
    """

    before: Tensor
    after: Tensor

    @classmethod
    def mean(cls, parts: Sequence[Self], weights: Sequence[float | Tensor]) -> Self:
        """As for any signal; the counts are those of all parts."""
        return replace(super().mean(parts, weights), before=parts[0].before, after=parts[0].after)


class BlockSite(Site):
    """The hidden states (b, s, d) that a block gives to the next one."""

    kind = "block"
    locations: ClassVar[dict[str, str]] = {"block": "output_reft"}
    holder = "reft_layer"

    def __init__(self, place: Place, block: nn.Module, width: int) -> None:
        """width: d of the hidden states."""
        super().__init__(place, block)
        self.width = width

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """Every block."""
        for block in anatomy.blocks:
            place = Place(block.layer, block.stack, block.path, block.path, "block")
            yield cls(place, block.module, block.width)

    def attach(self) -> list[RemovableHandle]:
        """Hook the block's output."""
        return [self.host.register_forward_hook(self.on_output, prepend=True)]

    def on_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hidden states become what the adapters make of them."""
        plan = self.plan()
        if plan is None:
            return None
        hidden = output if isinstance(output, Tensor) else output[0]
        rows, length = hidden.shape[:2]
        forward, device = current(), hidden.device
        if forward is None or forward.sites is not self.owner:
            before, after = _without_mask(0, rows, length, None, device)
        else:
            key = (BlockSite, self.stack, rows, length, device)
            before, after = forward.once(key, lambda: _counts(forward, self.stack, rows, length, device))
        hidden = evaluate(plan, BlockSignal(None, hidden, before, after), self).hidden
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _counts(forward: Forward, stack: str, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The real tokens (b, s) before and after each position of this pass."""
    prompt = None if stack == "encoder" else forward.prompt
    past = 0 if stack == "encoder" else forward.past
    mask = forward.masks.get(stack)
    if mask is not None and len(mask) == rows and mask.shape[1] >= length:
        real = (mask.to(device) != 0).long()
        counted = real.cumsum(1)
        total = counted[:, -1:] if prompt is None else counted[:, :prompt][:, -1:]
        before, real = (counted - real)[:, -length:], real[:, -length:]
        column = torch.arange(mask.shape[1] - length, mask.shape[1], device=device)
        padding = real == 0
        return before.masked_fill(padding, FAR), _after(before, total, column, prompt).masked_fill(padding, FAR)
    if forward.positions is not None and forward.positions.dim() == 2 and forward.positions.shape[1] == length:
        before = forward.positions.to(device).expand(rows, -1)
        padding = pad(before[:, :-1] == before[:, 1:], (0, 1))  # padding has the number of the first token, behind it
        column = past + torch.arange(length, device=device)
        given = before if prompt is None else before.masked_fill(column >= prompt, -1)
        after = _after(before, given.amax(1, keepdim=True) + 1, column, prompt)
        return before.masked_fill(padding, FAR), after.masked_fill(padding, FAR)
    return _without_mask(past, rows, length, prompt, device)


def _without_mask(
    past: int | Tensor, rows: int, length: int, prompt: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    before = (past + torch.arange(length, device=device)).expand(rows, -1)
    return before, _after(before, past + length if prompt is None else prompt, before, prompt)


def _after(before: Tensor, total: int | Tensor, column: Tensor, prompt: int | None) -> Tensor:
    """(b, s) the rest of `total` real tokens, FAR in the columns behind the prompt."""
    after = total - 1 - before
    return after if prompt is None else after.masked_fill(column >= prompt, FAR)
