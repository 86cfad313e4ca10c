"""The configurations of adapters, at the place where 1.x had them."""

from typing import Any

from .. import configuration


def __getattr__(name: str) -> Any:
    return getattr(configuration, name)


def __dir__() -> list[str]:
    return dir(configuration)
