"""Prompts within a stack of blocks: for images, sounds and queries, where no embeddings could be lengthened.

Each block is given the prompt's states in front of its own and gives both back, of which the rest of the model sees its
own alone. What lies along the sequence beside the states (masks, biases, rotations) is lengthened with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from .context import current
from .errors import AdapterError
from .samples import ROWS
from .topology import Anatomy, Block
from .trace import Watcher, parts, watch

Prompt = Callable[[int, int], Tensor | None]
"""(rows, d) -> the prompt (rows, p, d), or None if there is none; d = 0 where only p is asked for."""


class _Passed(threading.local):
    """The prompt's states on their way, where a part of the model is called by itself; copies start empty."""

    def __init__(self) -> None:
        self.states: dict[Any, Tensor] = {}

    def __reduce__(self) -> tuple[type[_Passed], tuple[()]]:
        return _Passed, ()


class Stack:
    """A list of blocks that hand states (b, s, d) on."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        """See the class."""
        self.path, self.width = blocks[0].path, blocks[0].width
        self.modules = [block.module for block in blocks]
        self.prompt: Prompt
        self._passed = _Passed()

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Stack]:
        """Those whose blocks attend, to themselves alone if there are such, and run with longer states.

        Raises:
            AdapterError: there are blocks that attend, but none that run with longer states.
        """
        grouped = groupby(anatomy.blocks, key=lambda block: block.path.rpartition(".")[0])
        stacks = [blocks for blocks in (list(group) for _, group in grouped) if all(block.cores for block in blocks)]
        crossing = [
            any(core.role == "cross_attention" for block in blocks for core in block.cores) for blocks in stacks
        ]
        fitting = False
        for blocks, crosses in zip(stacks, crossing, strict=True):
            stack = cls(blocks)
            reached = (found for found in map(stack._runs_longer, parts(anatomy.base_model)) if found is not None)
            if (all(crossing) or not crosses) and next(reached, False):
                fitting = True
                yield stack
        if stacks and not fitting:
            raise AdapterError(
                f"add_adapter: prompts have no place in {type(anatomy.base_model).__name__}: its blocks run with as "
                "many states as its input has, and with no more; use LoRA or a bottleneck adapter."
            )

    def _runs_longer(self, model: nn.Module) -> bool | None:
        """Whether a pass of `model` on the smallest input gets as far with one more state as without.

        None: it does not reach the blocks.
        """
        if self.modules[0] not in set(model.modules()):
            return None
        plain, error = _seen(model)
        last = next((call for call in plain.calls if call.module is self.modules[-1] and call.outputs), None)
        if last is None:
            return None
        states = plain.alive[next(iter(last.outputs.values()))]
        if states.dim() != 3 or len(states) != ROWS or states.shape[-1] != self.width:
            return False
        handles = self.attach(lambda rows, width: states.new_zeros(rows, 1, width))
        try:
            longer, longer_error = _seen(model)
        finally:
            for handle in handles:
                handle.remove()
        ended = any(call.module is self.modules[-1] and call.end for call in longer.calls)
        return ended and (longer_error is None or error is not None)

    def attach(self, prompt: Prompt) -> list[RemovableHandle]:
        """Hook all blocks: transformers, which keeps the states behind each, is to see the block's own alone."""
        self.prompt = prompt
        entries = [block.register_forward_pre_hook(self.on_entry, with_kwargs=True) for block in self.modules]
        return entries + [block.register_forward_hook(self.on_exit, prepend=True) for block in self.modules]

    def on_entry(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block is given the prompt's states in front of its own."""
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        given = dict(named)
        name, states = next((name, value) for name, value in given.items() if isinstance(value, Tensor))
        asked = self.prompt(len(states), 0)
        if asked is None:
            return None
        tokens, length = states.shape[1], asked.shape[1]
        given = {key: _lengthened(key, value, tokens, length) for key, value in given.items()}
        given[name] = torch.cat([self._entering(block, states), states], 1)
        return tuple(given.pop(place) for place in range(len(args))), given

    def _entering(self, block: nn.Module, states: Tensor) -> Tensor:
        """(b, p, d) the prompt's states in front of a block; a block that is left out in training hands none on."""
        kept = self._kept()
        if block is self.modules[0] and current() is None:
            kept.clear()
        if self not in kept:
            kept[self] = self.prompt(len(states), self.width)
        entering: Tensor = kept[self]
        return entering.to(states.dtype)

    def on_exit(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The block gives its own states, the prompt's are kept for the next one."""
        states = output if isinstance(output, Tensor) else output[0]
        asked = self.prompt(len(states), 0)
        if asked is None:
            return None
        length = asked.shape[1]
        self._kept()[self] = states[:, :length]
        states = states[:, length:]
        return states if isinstance(output, Tensor) else type(output)((states, *output[1:]))

    def _kept(self) -> dict[Any, Any]:
        forward = current()
        return self._passed.states if forward is None else forward.once(Stack, dict)


def _seen(model: nn.Module) -> tuple[Watcher, Exception | None]:
    """What a pass on the smallest input does, and why it did not come to its end."""
    watcher = Watcher()
    try:
        watch(watcher, model, [])
    except Exception as error:  # a model's own code, which may refuse such inputs by any
        return watcher, error
    return watcher, None


def embeddings_module(stack: nn.Module) -> nn.Module | None:
    """The module that makes embeddings, positions and all, of what a model is given; rotary positions come later."""
    found = stack._modules.get("embeddings")
    rotary = any("rotary" in name for name in stack._modules)
    return None if rotary or isinstance(found, nn.Embedding) else found


def runs_longer(model: nn.Module, embeddings: nn.Module) -> bool:
    """Whether an embeddings module gives (b, s, d) alone and the rest runs with one more, as far as a pass tells."""
    plain, error = _seen(model)
    call = next((call for call in plain.calls if call.module is embeddings and call.end), None)
    if call is None:
        return True
    if None not in call.outputs or plain.alive[call.outputs[None]].dim() != 3:
        return False
    with embeddings.register_forward_hook(lambda module, args, output: pad(output, (0, 0, 1, 0))):
        return _seen(model)[1] is None or error is not None


def _lengthened(name: int | str, value: Any, tokens: int, length: int) -> Any:
    """`value` with `length` more positions in front, if it lies along the `tokens` of the sequence.

    A prompt is seen by all, sees what the first token sees, and is not rotated.
    """
    if _is_rotation(value, tokens):
        return tuple(pad(part, (0, 0, length, 0), value=start) for part, start in zip(value, (1.0, 0.0), strict=True))
    if not isinstance(value, Tensor):
        return value
    seen = 0.0 if value.is_floating_point() and value.dim() > 2 else True
    square = value.dim() > 2 and value.shape[-2:] == (tokens, tokens)
    if square or (value.dim() == 4 and value.shape[-2:] == (1, tokens)):
        value = pad(value, (length, 0), value=seen)
        return torch.cat([value[..., :1, :].expand(*value.shape[:-2], length, -1), value], -2) if square else value
    if value.dim() == 3 and value.shape[1] == tokens:
        return pad(value, (0, 0, length, 0))
    if value.dim() == 2 and value.shape[1] == tokens:
        return pad(value, (length, 0), value=0 if "position" in str(name) else seen)
    return value


def _is_rotation(value: Any, tokens: int) -> bool:
    """Whether these are the cosines and sines of rotary positions."""
    return (
        isinstance(value, tuple)
        and len(value) == len("cs")
        and all(isinstance(part, Tensor) and part.dim() > 1 and part.shape[-2] == tokens for part in value)
    )
