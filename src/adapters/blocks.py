"""The site of methods that change the output of a whole block, at some positions of the sequence."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from .context import Forward, current
from .errors import AdapterError
from .evaluation import evaluate
from .samples import ROWS
from .signals import HiddenSignal
from .sites import Place, Site
from .topology import Anatomy, Block
from .trace import Watcher, parts, watch

FAR = 2**30
"""The distance of a position that is no token, or none of the prompt's."""
GRID = "grid"
PACKED = "has the positions of all rows in one dimension"


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


@dataclass(frozen=True)
class Form:
    """How hidden states lie in a tensor: the dimensions of the batch and of d; all others are positions, row by row."""

    rows: int
    channels: int

    def sequence(self, hidden: Tensor) -> Tensor:
        """(b, s, d)."""
        return hidden.movedim((self.rows, self.channels), (0, -1)).flatten(1, -2)

    def restored(self, sequence: Tensor, shape: torch.Size) -> Tensor:
        """(b, s, d) in `shape` as the model has it."""
        places = [size for place, size in enumerate(shape) if place not in (self.rows, self.channels % len(shape))]
        spread = sequence.reshape(len(sequence), *places, sequence.shape[-1])
        return spread.movedim((0, -1), (self.rows, self.channels))


class Packed(threading.local):
    """Hidden states (n, d) of images one behind the other; `lengths`: how many positions each has, in this thread."""

    def __init__(self, tower: nn.Module) -> None:
        """tower: the model around the blocks, which is given a grid (images, 3) of (t, h, w)."""
        self.tower, self.lengths = tower, [0]
        self.names = tuple(inspect.signature(tower.forward).parameters)
        self.name = next(name for name in self.names if GRID in name)

    @classmethod
    def around(cls, model: nn.Module, block: nn.Module) -> Self | None:
        """That of the smallest model around a block that is given such a grid."""
        towers = (part for part in parts(model) if block in set(part.modules()))
        fitting = [part for part in towers if any(GRID in name for name in inspect.signature(part.forward).parameters)]
        return cls(fitting[-1]) if fitting else None

    def __reduce__(self) -> tuple[type[Packed], tuple[nn.Module]]:
        return Packed, (self.tower,)

    def attach(self) -> RemovableHandle:
        """Read the grid whenever the tower runs."""
        return self.tower.register_forward_pre_hook(self.on_entry, with_kwargs=True)

    def on_entry(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the lengths."""
        self.lengths = {**dict(zip(self.names, args, strict=False)), **kwargs}[self.name].prod(-1).tolist()

    def signal(self, hidden: Tensor) -> BlockSignal:
        """The states (n, d) with a row for each image of each channel.

        Raises:
            AdapterError: they are not those of the grid's patches.
        """
        channels, rest = divmod(len(hidden), sum(self.lengths) or len(hidden) + 1)
        if rest:
            raise AdapterError(
                f"{type(self.tower).__name__} has {len(hidden)} states for images of {self.lengths} patches, so no "
                "first and last positions can be told; use LoRA or a bottleneck adapter."
            )
        lengths = self.lengths * channels
        rows = pad_sequence(list(torch.split(hidden, lengths)), batch_first=True)
        before = torch.arange(rows.shape[1], device=hidden.device).expand(len(rows), -1)
        after = torch.tensor(lengths, device=hidden.device)[:, None] - 1 - before
        return BlockSignal(None, rows, before.masked_fill(after < 0, FAR), after.masked_fill(after < 0, FAR))

    def packed(self, rows: Tensor) -> Tensor:
        """The reverse."""
        return torch.cat([row[: self.lengths[number % len(self.lengths)]] for number, row in enumerate(rows)])


_FORMS: dict[tuple[type, type], Form | str | None] = {}


class BlockSite(Site):
    """The hidden states that a block gives to the next one, as (b, s, d): a map's positions follow line by line."""

    kind = "block"
    locations: ClassVar[dict[str, str]] = {"block": "output_reft"}
    holder = "reft_layer"

    def __init__(self, place: Place, block: nn.Module, width: int, form: Form | Packed | None = None) -> None:
        """width: d of the hidden states; form: how they lie, None if they are (b, s, d)."""
        super().__init__(place, block)
        self.width, self.form = width, form

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """Every block but those of towers whose states are no sequence for each row.

        Raises:
            AdapterError: the model has no others.
        """
        forms: dict[str, Form | Packed | str | None] = {**_forms(anatomy)}
        for block in anatomy.blocks:
            form = forms.get(block.path)
            if isinstance(form, str) and PACKED in form:
                forms[block.path] = Packed.around(anatomy.base_model, block.module) or form
        refused = next((form for form in forms.values() if isinstance(form, str)), None)
        if refused and all(isinstance(forms.get(block.path), str) for block in anatomy.blocks):
            raise AdapterError(
                f"add_adapter: {refused}, so no first and last positions of a row can be told; use LoRA or a "
                "bottleneck adapter for this model."
            )
        for block in anatomy.blocks:
            form = forms.get(block.path)
            if not isinstance(form, str):
                place = Place(block.layer, block.stack, block.path, block.path, "block")
                yield cls(place, block.module, block.width, form)

    def attach(self) -> list[RemovableHandle]:
        """Hook the block's output."""
        grid = [self.form.attach()] if isinstance(self.form, Packed) else []
        return [*grid, self.host.register_forward_hook(self.on_output, prepend=True)]

    def on_output(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hidden states become what the adapters make of them."""
        plan = self.plan()
        if plan is None:
            return None
        given = output if isinstance(output, Tensor) else output[0]
        if isinstance(self.form, Packed):
            hidden = self.form.packed(evaluate(plan, self.form.signal(given), self).hidden)
            return hidden if isinstance(output, Tensor) else (hidden, *output[1:])
        if self.form is None and given.dim() != 3:
            raise AdapterError(
                f"{self.layer_path} gives hidden states {tuple(given.shape)}, not (b, s, d), so no first and last "
                "positions can be told; leave this layer out, or use LoRA or a bottleneck adapter."
            )
        hidden = given if self.form is None else self.form.sequence(given)
        rows, length = hidden.shape[:2]
        forward, device = current(), hidden.device
        if forward is None or forward.sites is not self.owner:
            before, after = _without_mask(0, rows, length, None, device)
        else:
            key = (BlockSite, self.stack, rows, length, device)
            before, after = forward.once(key, lambda: _counts(forward, self.stack, rows, length, device))
        hidden = evaluate(plan, BlockSignal(None, hidden, before, after), self).hidden
        hidden = hidden if self.form is None else self.form.restored(hidden, given.shape)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _forms(anatomy: Anatomy) -> dict[str, Form | str | None]:
    """For every block that runs on the smallest input how its states lie, or why they are no sequence.

    None: as (b, s, d). One pass for each class of model tells.
    """

    def key(block: Block) -> tuple[type, type]:
        return type(anatomy.base_model), type(block.module)

    missing = [block for block in anatomy.blocks if key(block) not in _FORMS]
    for part in parts(anatomy.base_model) if missing else ():
        inside = set(part.modules())
        unseen = [block for block in missing if key(block) not in _FORMS and block.module in inside]
        if unseen:
            watcher = Watcher()
            with suppress(Exception):  # a model's own code, which may refuse such inputs by any; then nothing is known
                watch(watcher, part, unseen)
            for block in unseen:
                outputs = [call.outputs for call in watcher.calls if call.module is block.module and call.outputs]
                if outputs:
                    shape = watcher.alive[next(iter(outputs[0].values()))].shape
                    _FORMS[key(block)] = _form(anatomy, block, shape)
    return {block.path: _FORMS[key(block)] for block in anatomy.blocks if key(block) in _FORMS}


def _form(anatomy: Anatomy, block: Block, shape: torch.Size) -> Form | str | None:
    name = type(anatomy.base_model).__name__
    if len(shape) < 3:
        return f"{name} {PACKED} in its blocks"
    if len(shape) > 3 and anatomy.base_model.main_input_name == "input_ids":
        return f"the blocks of {name} give several hidden states for each token"
    convolves = any(isinstance(module, nn.Conv2d) for module in block.module.modules())
    channels = 1 if block.width == shape[1] and (convolves or shape[-1] != block.width) else -1
    rows = 1 if channels == -1 and len(shape) == 3 and shape[0] != ROWS == shape[1] else 0
    return None if len(shape) == 3 and (rows, channels) == (0, -1) else Form(rows, channels)


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
