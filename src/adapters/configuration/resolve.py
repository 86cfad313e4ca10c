"""From what a user gives (an identifier, a config string, a file, a dictionary) to a configuration."""

import ast
import re
from collections.abc import Mapping
from typing import Any

from .. import methods  # noqa: F401  (fills the registry)
from ..errors import ConfigError, suggestion
from .base import AdapterConfig
from .files import read_config_file
from .registry import ADAPTER_CONFIG_MAP, ARCHITECTURES, DEFAULT_ADAPTER_CONFIG, PRESETS
from .union import ConfigUnion

__all__ = [
    "ADAPTER_CONFIG_MAP",
    "DEFAULT_ADAPTER_CONFIG",
    "build_config",
    "load_config",
    "parse_adapter_config_string",
    "resolve_adapter_config",
]


def load_config(config: Mapping[str, Any] | str | None, changes: Mapping[str, Any]) -> AdapterConfig | None:
    """See :meth:`AdapterConfig.load`; a change to None is none."""
    if not config:
        return None
    changes = {name: value for name, value in changes.items() if value is not None}
    values = resolve_adapter_config(config)
    if isinstance(values, AdapterConfig) or values.get("architecture") == ConfigUnion.architecture:
        return build_config(values).replace(**changes)
    return build_config({**values, **changes})


def resolve_adapter_config(
    config: Mapping[str, Any] | str, local_map: Mapping[str, Mapping[str, Any]] | None = None
) -> Mapping[str, Any]:
    """The fields that ``config`` stands for: itself, or what its identifier, file or config string gives.

    Args:
        config: A mapping, an identifier, the path of a JSON file or a config string.
        local_map: Identifiers to look up instead of ``ADAPTER_CONFIG_MAP``.

    Raises:
        ConfigError: ``config`` is none of these.
    """
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str):
        raise ConfigError(
            f"AdapterConfig.load({config!r}): it is of type {type(config).__name__}; "
            "give an identifier, a config string, a dictionary, the path of a JSON file or a configuration."
        )
    known = ADAPTER_CONFIG_MAP if local_map is None else local_map
    if config in known:
        return known[config]
    found = read_config_file(config)
    return parse_adapter_config_string(config) if found is None else found


def build_config(values: Mapping[str, Any]) -> AdapterConfig:
    """The configuration with the given fields, of the class that ``"architecture"`` and the fields tell.

    A configuration is returned as it is. ``values`` is not changed.

    Raises:
        ConfigError: the architecture or a field is unknown, a field is missing or its value is not allowed.
    """
    if isinstance(values, AdapterConfig):
        return values
    architecture = values.get("architecture")
    if architecture == ConfigUnion.architecture:
        return ConfigUnion.from_dict(values)
    if architecture not in ARCHITECTURES:
        known = [name for name in ARCHITECTURES if name]
        raise ConfigError(
            f"adapter config: unknown architecture {architecture!r}; {suggestion(str(architecture), known)}"
        )
    config_class = ARCHITECTURES[architecture]
    if "architecture" not in config_class.field_names():
        values = {name: value for name, value in values.items() if name != "architecture"}
    return _as_preset(config_class.from_dict(values))


def _as_preset(config: AdapterConfig) -> AdapterConfig:
    for preset in reversed(PRESETS):
        if preset.base is type(config) and preset.fits(config):
            return preset.config_class(**config)
    return config


_PART = re.compile(r"(?P<name>[^\[\]|\n]+)(?:\[(?P<fields>.*)\])?", re.DOTALL)


def parse_adapter_config_string(config_string: str) -> AdapterConfig:
    """The configuration of a string ``name[field=value, ...]``; several, joined by ``|``, make a union.

    Values are Python literals.

    Raises:
        ConfigError: the string is not of this form, or a name, field or value is not known.

    Example:
        >>> parse_adapter_config_string("prefix_tuning[flat=True] | par_bn").to_dict()["architecture"]
        'union'
    """
    parts = [_parse_part(part.strip(), config_string) for part in config_string.split("|")]
    return parts[0] if len(parts) == 1 else ConfigUnion(*parts)


def _parse_part(part: str, whole: str) -> AdapterConfig:
    match = _PART.fullmatch(part)
    if match is None:
        raise ConfigError(
            f"AdapterConfig.load({whole!r}): Invalid adapter config string format: {part!r}; "
            "it must be name or name[field=value, ...]."
        )
    name = match["name"].strip()
    if name not in ADAPTER_CONFIG_MAP:
        raise ConfigError(
            f"AdapterConfig.load({whole!r}): Could not identify {name!r} as a valid adapter configuration; "
            f"no file has that name, {suggestion(name, ADAPTER_CONFIG_MAP)}"
        )
    return ADAPTER_CONFIG_MAP[name].replace(**_parse_fields(match["fields"] or "", whole))


def _parse_fields(fields: str, whole: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"dict({fields})", mode="eval").body
        keywords = call.keywords if isinstance(call, ast.Call) and not call.args else []
        values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in keywords if keyword.arg is not None}
        if len(values) != len(keywords) or (fields.strip() and not keywords):
            raise ValueError("a value without a field, or a field twice")
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"AdapterConfig.load({whole!r}): Invalid adapter configuration {fields!r}; "
            "it must be field=value, ... with Python literals as values (strings in quotes)."
        ) from error
    return values
