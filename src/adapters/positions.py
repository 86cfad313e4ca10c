"""The site of what stands in front of the tokens and is counted: it moves their positions on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .evaluation import evaluate
from .interfaces import POSITIONS_FROM_MASK
from .signals import Signal
from .sites import Place, Site
from .topology import Anatomy

COUNTER = "create_position_ids_from_input_ids"
"""What models of RoBERTa's family count positions with: over real tokens, from the padding's number on."""


@dataclass(frozen=True)
class PositionSignal(Signal):
    """shift: (b, 1) by how much the positions of each row move on."""

    shift: Tensor


class PositionSite(Site):
    """The position ids of a model that counts them from 0 on, given or not."""

    kind = "positions"
    locations: ClassVar[dict[str, str]] = {"": "positions"}

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """One, if there are such ids."""
        model = anatomy.base_model
        counts_tokens = model.config.model_type in POSITIONS_FROM_MASK or any(
            COUNTER in dir(type(module)) for module in model.children()
        )
        encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        if "position_ids" in _parameters(model) and not counts_tokens and not encoder_decoder:
            yield cls(Place(-1, "", "", "", ""), model)

    def attach(self) -> list[RemovableHandle]:
        """Stand at the model's entrance."""
        return [self.owner.at_entrance(self)]

    def around(self, forward: Callable[..., Any], model: nn.Module, *args: Any, inside: bool, **kwargs: Any) -> Any:
        """The base model's forward with its positions moved on."""
        plan = self.plan()
        if plan is None:
            return forward(model, *args, **kwargs)
        given: dict[str, Any] = {**dict(zip(_parameters(self.host), args, strict=False)), **kwargs}
        tokens: Any = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
        positions, cache = given.get("position_ids"), given.get("past_key_values")
        if positions is None:
            past = 0 if cache is None else int(cache.get_seq_length())
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        start = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        shift = evaluate(plan, PositionSignal(None, start), self).shift
        return forward(model, **{**given, "position_ids": positions + shift.to(positions.dtype)})


def _parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of what a model's forward takes."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]
