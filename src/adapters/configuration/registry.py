"""What the methods register: identifiers of configurations, and the class for each architecture and preset.

The tables are filled when ``adapters.methods`` is imported; ``resolve`` does that before it reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .base import AdapterConfig

C = TypeVar("C", bound=AdapterConfig)

ADAPTER_CONFIG_MAP: dict[str, AdapterConfig] = {}
"""The configuration of each identifier; the instances are shared."""

DEFAULT_ADAPTER_CONFIG = "seq_bn"
"""The identifier that stands for no configuration."""

ARCHITECTURES: dict[str | None, type[AdapterConfig]] = {}
"""The class of each architecture in a file."""


@dataclass(frozen=True)
class Preset:
    """A class that only changes defaults, and how to tell that a configuration of its base is one."""

    config_class: type[AdapterConfig]
    base: type[AdapterConfig]
    fits: Callable[[Any], bool]


PRESETS: list[Preset] = []
"""The presets that can be told from their fields; where several fit, the last one is meant."""


def register_architecture(name: str | None, config_class: type[AdapterConfig]) -> None:
    """Build the configurations of architecture ``name`` as ``config_class``."""
    ARCHITECTURES[name] = config_class


def register_preset(config_class: type[C], base: type[C], fits: Callable[[Any], bool]) -> None:
    """Give configurations of class ``base`` that ``fits`` accepts the class ``config_class`` when they are loaded."""
    PRESETS.append(Preset(config_class, base, fits))


def register_config(name: str, config: AdapterConfig, *aliases: str) -> None:
    """Make ``name`` and the ``aliases`` identifiers of ``config``."""
    ADAPTER_CONFIG_MAP.update(dict.fromkeys((name, *aliases), config))
