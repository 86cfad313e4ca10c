"""Which rows of a batch go to which head, and the output of several heads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from ..composition import BatchSplit, Block, Parallel, Setup
from ..errors import AdapterError, CompositionError, listing
from .base import field_names

# What a head replaces by its own predictions; all else of the base model's output is handed on.
CONSUMED = frozenset({"last_hidden_state", "pooler_output"})

CHOICE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")

HeadSetup = str | Sequence[str] | Block | None
Selection = slice | list[int]
"""Rows of a batch."""


@dataclass
class MultiHeadOutput(ModelOutput):
    """The outputs of several heads: ``output[i]``, ``len`` and iteration address the heads, ``loss`` is their sum.

    The loss is None when the heads share the whole batch: how to weigh them is then the caller's choice.
    """

    head_outputs: list[Any] | None = None
    loss: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """The logits of all heads, one below the other."""
        return torch.vstack([output["logits"] for output in self])

    def __getitem__(self, key: Any) -> Any:
        """A head's output by its index, a field by its name."""
        return ModelOutput.__getitem__(self, key) if isinstance(key, str) else (self.head_outputs or [])[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            ModelOutput.__setitem__(self, key, value)
        else:
            (self.head_outputs or [])[key] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.head_outputs or [])

    def __len__(self) -> int:
        return len(self.head_outputs or [])


@dataclass(frozen=True)
class HeadPlan:
    """The heads of one forward pass and how they share its batch.

    ``sizes``: rows of each head (BatchSplit). ``parallel``: each head has one channel of the repeated batch.
    ``assignment``: the number of each row's head (``adapter_names`` with one entry for each row).
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    parallel: bool = False
    assignment: tuple[int, ...] | None = None

    @classmethod
    def of(cls, setup: HeadSetup) -> "HeadPlan":
        """Reads what ``active_head`` and ``head=`` accept: a name, several names, or a block of names."""
        if not setup:
            return cls(())
        if isinstance(setup, str):
            return cls((setup,))
        names = tuple(child.last() if isinstance(child, Block) else child or "" for child in setup)
        return cls(
            names, tuple(setup.batch_sizes) if isinstance(setup, BatchSplit) else None, isinstance(setup, Parallel)
        )

    @classmethod
    def of_rows(cls, setups: Sequence[Setup], assignment: Sequence[int]) -> "HeadPlan":
        """Each row goes to the head of the last adapter of its setup, the one numbered ``assignment`` says."""
        last = [setup.last() if isinstance(setup, Block) else setup or "" for setup in setups]
        names = tuple(dict.fromkeys(last))
        return cls(names, assignment=tuple(names.index(last[number]) for number in assignment))

    def rows(self, total: int, channels: int, repeated: bool) -> list[Selection] | None:
        """The rows of each head in a batch of ``total`` rows; None if every head takes all.

        ``repeated``: ``generate`` may have repeated each row in place, for beams and for return sequences.

        Raises:
            CompositionError: The sizes do not add up to the batch, or there is not one head for each channel.
        """
        if self.assignment is not None:
            return [
                [row for row, number in enumerate(self.assignment) if number == head] for head in range(len(self.names))
            ]
        if self.sizes is not None:
            size = sum(self.sizes)
            if repeated and size and total % size == 0:
                return windows([rows * (total // size) for rows in self.sizes])
            if size != total:
                raise CompositionError(
                    f"BatchSplit(batch_sizes={list(self.sizes)}) of heads: The specified batch sizes sum to "
                    f"{size}, the batch has {total} rows; they must be equal."
                )
            return windows(self.sizes)
        if not self.parallel and channels == 1:
            return None
        if len(self.names) != channels:
            raise CompositionError(
                f"forward with heads {listing(self.names)}: The number of parallel adapters ({channels}) and the "
                f"number of active heads ({len(self.names)}) must match. Set active_head to one head per adapter."
            )
        return windows([total // channels] * channels)


def windows(sizes: Sequence[int]) -> list[Selection]:
    """Consecutive slices of these lengths."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def take_rows(value: Any, rows: Selection, total: int) -> Any:
    """These rows of every tensor of the batch in ``value``; what has no batch of ``total`` rows stays whole."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.dim() and len(value) == total else value
    if isinstance(value, ModelOutput):
        present = [name for name in field_names(type(value)) if name in value]
        return type(value)(**{name: take_rows(value[name], rows, total) for name in present})
    if isinstance(value, Mapping):
        return {name: take_rows(part, rows, total) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(take_rows(part, rows, total) for part in value)
    return value


def flatten_choices(inputs: dict[str, Any]) -> dict[str, Any]:
    """Makes rows of the choices of multiple-choice inputs: ``(b, c, s) -> (b * c, s)``."""
    tokens, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (tokens is None or tokens.dim() != 3) and (embeddings is None or embeddings.dim() != 4):
        return inputs
    flat = {name: inputs[name].flatten(0, 1) for name in CHOICE_INPUTS if inputs.get(name) is not None}
    return {**inputs, **flat}


def gather(results: list[Any], summed: bool) -> MultiHeadOutput:
    """The outputs of several heads as one; the loss is the sum if every head has one and ``summed``."""
    losses = [result["loss"] for result in results if isinstance(result, ModelOutput) and "loss" in result]
    complete = summed and len(losses) == len(results)
    return MultiHeadOutput(head_outputs=results, loss=sum(losses) if complete else None)


def hand_on(result: Any, outputs: ModelOutput) -> Any:
    """Adds to a head's output what the base model returned beside the hidden states."""
    if isinstance(result, ModelOutput):
        for name, value in outputs.items():
            if name not in CONSUMED and result.get(name) is None:
                result[name] = value
    return result


def to_tuple(result: Any) -> Any:
    """The output for ``return_dict=False``; the container of several heads stays, its elements become tuples."""
    if isinstance(result, MultiHeadOutput):
        return MultiHeadOutput(head_outputs=[to_tuple(part) for part in result], loss=result.loss)
    return result.to_tuple() if isinstance(result, ModelOutput) else result


def check_names(asked: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Checks that the model has these heads.

    Raises:
        AdapterError: It has not.
    """
    for name in names:
        if name not in known:
            raise AdapterError(
                f"{asked}: Unknown head_name {name!r}; this model has {listing(known)}. "
                "Add a head with one of the add_*_head methods or load_head."
            )
