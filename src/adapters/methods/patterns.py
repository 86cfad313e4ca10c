r"""Values for single places of a model: dicts from regular expressions, roles, layers or locations to values.

A key is the end of a module path as a regular expression (``(.*\.)?key$`` matches the path, as in PEFT), a role
(``"q"``, ``"intermediate"``), a layer (``"3"``) or a location (``"output_lora"``). Where several keys fit, a path wins
over a role, a role over a layer and a layer over a location; among paths the longest key wins, then the first by
alphabet. The order of the dict does not matter, since files do not keep it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..configuration.base import AdapterConfig
from ..errors import AdapterError, listing
from ..sites import Site


def check_pattern(config: AdapterConfig, name: str, wanted: str, allowed: Callable[[Any], bool]) -> None:
    """The field is a dict from keys to `allowed` values; numbers of layers become strings, as they are in files."""
    pattern = config[name]
    if not isinstance(pattern, Mapping) or not all(map(allowed, pattern.values())):
        raise config.refusal(name, "no pattern", f"it must be a dict from places to {wanted}")
    for key in map(str, pattern):
        try:
            re.compile(key)
        except re.error as error:
            raise config.refusal(name, f"no pattern ({key!r}: {error})", "keys are regular expressions") from error
    config.normalize(name, {str(key): value for key, value in pattern.items()})


def value_at(pattern: Mapping[str, Any], site: Site, default: Any) -> Any:
    """What the pattern says for a site; `default` if no key fits."""
    found = [(rank, -len(key), key) for key in pattern if (rank := _rank(key, site)) is not None]
    return pattern[min(found)[2]] if found else default


def check_used(config: AdapterConfig, name: str, sites: Iterable[Site]) -> None:
    """Every key of the field fits a site.

    Raises:
        AdapterError: one fits none, so that it would have no effect.
    """
    known = list(sites)
    for key in config[name]:
        if all(_rank(key, site) is None for site in known):
            raise AdapterError(
                f"add_adapter({type(config).__name__}({name}={config[name]})): {key!r} fits no place of this model; "
                f"places are such as {listing([site.path for site in known[:2]])}, the roles "
                f"{listing(sorted({site.role for site in known}))} and the numbers of layers."
            )


def _rank(key: str, site: Site) -> int | None:
    """0 for a path, 1 for a role, 2 for a layer, 3 for a location; None if the key does not fit the site."""
    exact = {site.role: 1, str(site.layer): 2, site.location: 3}
    if key in exact:
        return exact[key]
    return 0 if any(re.match(rf"(.*\.)?({key})$", path) for path in (site.path, site.host_path)) else None
