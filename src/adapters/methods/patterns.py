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

ATTENTION_MATRICES = ("q", "k", "v", "o")
ALL_LINEAR = "all-linear"
"""The value of ``target_modules`` for every linear map but those of the model's head; convolutions are none."""


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


def check_targets(config: AdapterConfig, field: str) -> None:
    """The field is None, a regular expression or a list of ends of module paths."""
    targets = config[field]
    wanted = "it must be a list of ends of module paths, or a regular expression for whole paths"
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise config.refusal(field, f"no pattern ({error})", wanted) from error
    elif targets is not None:
        names = sorted(targets) if isinstance(targets, set) else list(targets) if isinstance(targets, Iterable) else []
        if not names or not all(isinstance(name, str) and name for name in names):
            raise config.refusal(field, "no pattern", wanted)
        config.normalize(field, names)


def is_target(targets: str | list[str], site: Site) -> bool:
    """Whether ``target_modules`` names a site: a whole map, never a slice of a fused one."""
    if site.part:
        return False
    if targets == ALL_LINEAR:
        return site.kind == "linear" and not site.place.outside and site.reference.dim() < 3
    path: str = site.module_path
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)


def check_targets_used(config: AdapterConfig, field: str, sites: Iterable[Site]) -> None:
    """Every entry of the field fits a site.

    Raises:
        AdapterError: one fits none, so that it would have no effect.
    """
    targets, known = config[field], list(sites)
    for entry in [targets] if isinstance(targets, str) else targets or ():
        if not any(is_target(entry if entry is targets else [entry], site) for site in known):
            paths = dict.fromkeys(site.module_path for site in known if not site.part)
            raise AdapterError(
                f"add_adapter({type(config).__name__}({field}={targets!r})): {entry!r} fits no module that the "
                f"method can sit at; such modules are {listing(list(paths)[:6])} and so on."
            )


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
    return 0 if any(re.match(rf"(.*\.)?({key})$", path) for path in (site.path, site.module_path)) else None


def is_placed(config: Mapping[str, Any], site: Site) -> bool:
    """Whether ``target_modules``, or the flags of `config` for places, put a module at this map."""
    if site.layer in config["leave_out"]:
        return False
    if config["target_modules"] is not None:
        return is_target(config["target_modules"], site)
    named = site.role not in ATTENTION_MATRICES or site.role in config["attn_matrices"]
    return bool(config[site.location]) and named


def asked_locations(config: Mapping[str, Any], kind: type[Site]) -> set[str]:
    """The flags of `config` for places at sites of a kind that are set; none of them counts with ``target_modules``."""
    if config["target_modules"] is not None:
        return set()
    return {location for location in kind.locations.values() if config[location]}
