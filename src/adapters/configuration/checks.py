"""Checks of field values, called by the ``__post_init__`` of the configurations."""

from collections.abc import Iterable
from math import inf, isfinite
from typing import Any, TypeGuard

from ..errors import listing, suggestion
from .base import AdapterConfig

DTYPES = ("float64", "double", "float32", "float", "float16", "half", "bfloat16")
"""The names of the torch dtypes that a parameter may have."""


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is an integer; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a finite number; a truth value is none."""
    return (is_integer(value) or isinstance(value, float)) and isfinite(value)


def check_choice(config: AdapterConfig, field: str, allowed: Iterable[str | None]) -> None:
    """The field has one of the ``allowed`` values."""
    allowed = list(allowed)
    value = config[field]
    if isinstance(value, bool) or value not in allowed:
        names = [name for name in allowed if name is not None]
        optional = " or None" if None in allowed else ""
        raise config.refusal(field, "unknown", f"it must be one of {listing(names)}{optional}")


def check_integer(config: AdapterConfig, field: str, least: int) -> None:
    """The field is an integer that is ``least`` or more."""
    if not is_integer(config[field]) or config[field] < least:
        raise config.refusal(field, "out of range", f"it must be an integer >= {least}")


def check_number(config: AdapterConfig, field: str, above: float = -inf) -> None:
    """The field is a finite number, greater than ``above``."""
    if not is_number(config[field]) or config[field] <= above:
        bound = "" if above == -inf else f" > {above:g}"
        raise config.refusal(field, "out of range", f"it must be a number{bound}")


def check_fraction(config: AdapterConfig, field: str) -> None:
    """The field is a number in [0, 1), as the probability of a dropout is."""
    if not is_number(config[field]) or not 0 <= config[field] < 1:
        raise config.refusal(field, "out of range", "it must be a number in [0, 1)")
    config.normalize(field, float(config[field]))


def check_layers(config: AdapterConfig, field: str) -> None:
    """The field is a list of layer ids, which are integers from 0 on."""
    layers = list(config[field]) if isinstance(config[field], Iterable) else [None]
    if not all(is_integer(layer) and layer >= 0 for layer in layers):
        raise config.refusal(field, "no list of layers", "it must be a list of integers >= 0")
    config.normalize(field, layers)


def check_activation(config: AdapterConfig, field: str) -> None:
    """The field names an activation function of transformers; its case does not matter."""
    from transformers.activations import ACT2FN  # imports torch, which configurations alone do not need

    value = config[field]
    known = ["leakyrelu", *ACT2FN]
    if not isinstance(value, str) or value.lower() not in known:
        raise config.refusal(field, "no activation function", suggestion(str(value), known).rstrip("."))


def check_dtype(config: AdapterConfig, field: str) -> None:
    """The field is None or the name of a floating point dtype of torch."""
    check_choice(config, field, [*DTYPES, None])


def check_letters(config: AdapterConfig, field: str, allowed: Iterable[str]) -> None:
    """The field is a list of some of the ``allowed`` letters; a string of them becomes a list."""
    allowed = list(allowed)
    letters = list(config[field]) if isinstance(config[field], Iterable) else [None]
    if not all(letter in allowed for letter in letters):
        raise config.refusal(field, "no list of these letters", f"it must be a list of some of {listing(allowed)}")
    config.normalize(field, letters)
