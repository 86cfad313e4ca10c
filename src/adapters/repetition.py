"""The copies of a batch that the channels of Parallel need, and the blocks that need none of them.

A batch is repeated when it enters the model, so that all code of the model sees one batch size. What comes before the
first adapter would compute the same rows for every channel: whole blocks, and in that adapter's own block the attention
and the linear maps, are given the first channel's and their output is repeated: a copy in place of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache
from transformers.utils.generic import ModelOutput

from .context import START, Forward, Position, state
from .errors import CompositionError
from .sites import Site
from .topology import Anatomy, Block

ROW_VECTORS = ("labels", "start_positions", "end_positions", "next_sentence_label", "task_ids")
"""Inputs of one number for each row; all else of one dimension (cache positions, say) belongs to no row."""

PACKED = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "grid_thw")
"""Inputs that count something else than rows, such as all patches of all images: each channel has all of them."""

STEPS_BEFORE = {("sublayer", "self_attention"): 2, ("sublayer", "feed_forward"): 4, ("block", "block"): 4}
"""How many steps of a block come before an adapter that sits at none of them; see ``Position``."""


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
        if name in PACKED and value.dim() > 1:
            return value.repeat(channels, *[1] * (value.dim() - 1))
        rows = value.dim() > 1 or (value.dim() == 1 and name in ROW_VECTORS)
        return value.repeat(channels, *[1] * (value.dim() - 1)) if rows and value.shape[0] == batch else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: repeated(entry, batch, channels) for key, entry in value.items()})
    if isinstance(value, dict):
        return {key: repeated(entry, batch, channels) for key, entry in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(repeated(entry, batch, channels) for entry in value)
    return value


class SharedRows:
    """Lets what comes before the first adapter of a Parallel setup compute each row once."""

    def __init__(self, anatomy: Anatomy) -> None:
        blocks = anatomy.blocks
        # Where blocks are called more than once, one that is below an adapter may be above it too.
        once = anatomy.depth == len(blocks)
        self._blocks: dict[nn.Module, int] = {block.module: block.layer for block in blocks} if once else {}
        self._steps: dict[nn.Module, Position] = dict(_steps(blocks)) if once else {}
        self._handles: list[RemovableHandle] = []

    def position(self, site: Site) -> Position:
        """What has been computed when an adapter at `site` acts."""
        if site.layer < 0:
            return START
        return self._steps.get(site.host, (site.layer, STEPS_BEFORE.get((site.kind, site.role), 0)))

    @property
    def attached(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    def attach(self) -> None:
        """Hook all of them, unless they are: next to the modules, within the hooks of all sites that are there now."""
        for module in () if self._handles else (*self._blocks, *self._steps):
            self._handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self.after, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Undo it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _acting(self, module: nn.Module, inputs: list[Any], channels: bool) -> Forward | None:
        """The pass, if `module` is to be shared in it and is given the rows of all channels, or of the first."""
        forward = state.forward
        if forward is None or any(isinstance(value, (Cache, EncoderDecoderCache)) for value in inputs):
            return None
        layer, step = forward.shared_below
        shared = self._blocks[module] < layer if module in self._blocks else _within(self._steps[module], layer, step)
        rows = next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim() > 1), 0)
        return forward if shared and rows == forward.batch * (forward.channels if channels else 1) else None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of every tensor with rows, those of the first channel."""
        forward = self._acting(module, [*args, *kwargs.values()], channels=True)
        if forward is None:
            return None
        total = forward.batch * forward.channels
        return tuple(_first(value, forward.batch, total) for value in args), {
            name: _first(value, forward.batch, total) for name, value in kwargs.items()
        }

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output once per channel."""
        forward = self._acting(module, [*args, *kwargs.values()], channels=False)
        return None if forward is None else repeated(output, forward.batch, forward.channels)


def _steps(blocks: Iterable[Block]) -> Iterator[tuple[nn.Module, Position]]:
    """The steps of every block that has one attention; what is inside of its core is no step of its own."""
    for block in blocks:
        if len(block.cores) == 1:
            (core,) = block.cores
            yield core.module, (block.layer, 0)
            for step, found in enumerate((core.projections.get("o"), *block.feed_forward.values()), 1):
                if found is not None and not found.path.startswith(f"{core.path}."):
                    yield found.module, (block.layer, step)


def _within(position: Position, layer: int, step: int) -> bool:
    return position[0] == layer and position[1] < step


def _first(value: Any, batch: int, total: int) -> Any:
    if isinstance(value, Tensor):
        return value[:batch] if value.dim() > 1 and value.shape[0] == total else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_first(entry, batch, total) for entry in value)
    return value
