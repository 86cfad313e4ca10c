"""The copies of a batch that the channels of Parallel need, and the blocks that need none of them.

A batch is repeated when it enters the model, so that all code of the model sees one batch size. The blocks below the
first adapter would compute the same rows for every channel: they are given the first channel's and their output is
repeated, which costs a copy in place of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils.generic import ModelOutput

from .context import Forward, state
from .errors import CompositionError
from .topology import Anatomy

ROW_VECTORS = ("labels", "start_positions", "end_positions", "next_sentence_label", "task_ids")
"""Inputs of one number for each row; all else of one dimension (cache positions, say) belongs to no row."""
CACHES = ("past_key_values", "past_key_value", "cache_params")


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The number of rows that a model is given; None if nothing says it."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return int(value.shape[0])
    return None


def repeat_inputs(
    args: Sequence[Any], kwargs: Mapping[str, Any], channels: int
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """All that has a row for each input once per channel, channel after channel; and the number of rows before.

    Raises:
        CompositionError: nothing says how many rows there are.
    """
    batch = batch_size(args, kwargs)
    if batch is None:
        raise CompositionError(
            "Parallel: the forward call has no tensor with a batch dimension; pass input_ids or another input."
        )
    named = {name: repeated(value, batch, channels, name) for name, value in kwargs.items()}
    return tuple(repeated(value, batch, channels) for value in args), named, batch


def repeated(value: Any, batch: int, channels: int, name: str = "") -> Any:
    """`value` with its `batch` rows once per channel; what has no rows (cache positions, flags) stays as it is."""
    if isinstance(value, Tensor):
        rows = value.dim() > 1 or (value.dim() == 1 and name in ROW_VECTORS)
        return value.repeat(channels, *[1] * (value.dim() - 1)) if rows and value.shape[0] == batch else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: repeated(entry, batch, channels) for key, entry in value.items()})
    if isinstance(value, dict):
        return {key: repeated(entry, batch, channels) for key, entry in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(repeated(entry, batch, channels) for entry in value)
    return value


class SharedBlocks:
    """Lets the blocks below the first adapter of a Parallel setup compute each row once."""

    def __init__(self, anatomy: Anatomy) -> None:
        blocks = anatomy.blocks
        # Where blocks are called more than once, one that is below an adapter may be above it too.
        once = getattr(anatomy.base_model.config, "num_hidden_layers", 0) <= len(blocks)
        self._layers: dict[nn.Module, int] = {block.module: block.layer for block in blocks} if once else {}
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the blocks are hooked."""
        return bool(self._handles)

    def attach(self, wanted: bool) -> None:
        """Hook the blocks, or unhook them."""
        if wanted and not self._handles:
            for block in self._layers:
                self._handles.append(block.register_forward_pre_hook(self.before, with_kwargs=True))
                self._handles.append(block.register_forward_hook(self.after, with_kwargs=True))
        elif not wanted:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _acting(self, block: nn.Module, kwargs: dict[str, Any]) -> Forward | None:
        forward = state.forward
        if forward is None or self._layers[block] >= forward.shared_below:
            return None
        return None if any(kwargs.get(name) is not None for name in CACHES) else forward

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of every tensor with rows, those of the first channel."""
        forward = self._acting(block, kwargs)
        if forward is None:
            return None
        total = forward.batch * forward.channels
        return tuple(_first(value, forward.batch, total) for value in args), {
            name: _first(value, forward.batch, total) for name, value in kwargs.items()
        }

    def after(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output once per channel."""
        forward = self._acting(block, kwargs)
        return None if forward is None else repeated(output, forward.batch, forward.channels)


def _first(value: Any, batch: int, total: int) -> Any:
    if isinstance(value, Tensor):
        return value[:batch] if value.dim() > 1 and value.shape[0] == total else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_first(entry, batch, total) for entry in value)
    return value
