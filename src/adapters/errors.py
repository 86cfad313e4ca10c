"""The errors of this library: one family, each also of the type that 1.x raised at the same place.

A message reads ``<what was asked>: <what is wrong, with the value>; <what would be right>. <how to get there>.``
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches


class AdapterError(ValueError):
    """Base of all errors that a caller of this library may catch."""


class CompositionError(AdapterError, IndexError):
    """A composition block does not fit the model, its adapters or the batch."""


class ConfigError(AdapterError, TypeError):
    """A configuration has an unknown field or a value that no method accepts."""


class UnknownAdapterError(AdapterError, AssertionError):
    """An adapter, fusion or head of that name is not part of the model."""


class CheckpointError(AdapterError, OSError):
    """A checkpoint is missing, incomplete, broken or does not fit the model."""


def listing(names: Iterable[str]) -> str:
    """The names as they stand in a message: ``'a', 'b' and 'c'``, or ``none``."""
    quoted = [repr(name) for name in names]
    if not quoted:
        return "none"
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the closest known name, else the list of the known ones."""
    known = list(known)
    close = get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {listing(known)}."


def check_type(asked: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse an argument of another type.

    Args:
        asked: The call with the name of the argument, for the message.
        wanted: What would be right.

    Raises:
        ConfigError: The value is of none of the `kinds`.
    """
    if not isinstance(value, kinds):
        raise ConfigError(f"{asked}={value!r}: it is of type {type(value).__name__}; give {wanted}.")


def text_of(asked: str, path: object) -> str:
    """The text of a path or of a name.

    Raises:
        ConfigError: It is neither a string nor an ``os.PathLike``.
    """
    check_type(asked, path, (str, os.PathLike), "a path, or a name as a string")
    return str(path)
