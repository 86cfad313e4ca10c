"""The sub-layers of models that were recorded before: one pass for each class, configuration and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from .topology import Block
from .trace import Sublayer, trace_sublayers

KEPT = 64
"""So many models are remembered."""
Found = dict[str, dict[str, Any]]
_FOUND: dict[Any, Found] = {}


def recorded_sublayers(base_model: Any, blocks: list[Block]) -> dict[str, dict[str, Sublayer]]:
    """What ``trace_sublayers`` says; no second pass for a model that is built as one before.

    Raises:
        AdapterError: no block can be run.
    """
    key = (type(base_model), str(base_model.config.to_dict()), _shapes(base_model))
    if key not in _FOUND:
        found = trace_sublayers(base_model, blocks)
        if len(_FOUND) >= KEPT:
            del _FOUND[next(iter(_FOUND))]
        names = {module: path for path, module in base_model.named_modules()}
        _FOUND[key] = _renamed(found, names.__getitem__)
    modules = dict(base_model.named_modules())
    return _renamed(_FOUND[key], modules.__getitem__)


def _shapes(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())


def _renamed(found: Found, name: Callable[[Any], Any]) -> Found:
    """The same with modules in place of their paths, or the reverse."""

    def over(one: Any) -> Any:
        norm = None if one.norm is None else name(one.norm)
        return replace(one, entry=name(one.entry), exit=name(one.exit), norm=norm)

    return {path: {role: over(one) for role, one in roles.items()} for path, roles in found.items()}
