"""Configurations in JSON files."""

import json
from os.path import isfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def read_config_file(path: str) -> dict[str, Any] | None:
    """The ``"config"`` entry of a JSON file, or all of it; None if there is no such file.

    Raises:
        ConfigError: the file does not hold a JSON object.
    """
    if not isfile(path):  # which Path.is_file is not for: it raises for a long config string
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"AdapterConfig.load({path!r}): the file is not JSON ({error}).") from error
    config = content.get("config", content) if isinstance(content, dict) else content
    if not isinstance(config, dict):
        raise ConfigError(f"AdapterConfig.load({path!r}): the file has no configuration; it must hold a JSON object.")
    return config
