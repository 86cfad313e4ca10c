"""``adapters.describe``: where adapters can sit in a model, as a tree and a picture, and which methods apply to it."""

from __future__ import annotations

import copy
import html
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .configuration.base import AdapterConfig
from .configuration.registry import ADAPTER_CONFIG_MAP
from .errors import AdapterError
from .sitemap import SiteMap
from .sites import Site
from .wrap import init

COLOURS = {"linear": "#4e79a7", "sublayer": "#f28e2b", "attention": "#e15759", "block": "#76b7b2", "no": "#d62728"}
COLOURS |= {"embedding": "#59a14f", "lookup": "#59a14f", "output": "#59a14f", "prompt": "#b07aa1", "yes": "#2ca02c"}
LINE, INDENT = 20, 24


@dataclass(frozen=True)
class Applicability:
    """Whether a method applies to a model.

    places: how many modules it has at each location; reason: why it does not apply, as ``add_adapter`` says it.
    """

    method: str
    places: tuple[tuple[str, int], ...] = ()
    reason: str = ""

    @property
    def applies(self) -> bool:
        """Whether ``add_adapter`` takes it."""
        return not self.reason

    def __str__(self) -> str:
        found = ", ".join(f"{count} × {place}" for place, count in self.places)
        return f"{self.method:<20} {f'yes   {found}' if self.applies else f'no    {self.reason}'}"


@dataclass(frozen=True)
class Description:
    """What ``describe`` found; ``print`` shows it.

    groups: a title, such as "encoder.layer.0 … 11", and for each site of the layers its kind and a line of text.
    """

    model: str
    groups: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    methods: tuple[Applicability, ...]

    def __str__(self) -> str:
        lines = [self.model]
        for number, (title, sites) in enumerate(self.groups, 1):
            last = number == len(self.groups)
            lines.append(f"{'└' if last else '├'}── {title}")
            bar = " " if last else "│"
            lines += [f"{bar}   {'└' if site is sites[-1] else '├'}── {site[1]}" for site in sites]
        return "\n".join([*lines, "", *map(str, self.methods)])

    def svg(self) -> str:
        """The same as a picture: a line for each site in the colour of its kind."""
        rows: list[tuple[int, str, str]] = [(0, "", self.model)]
        for title, sites in self.groups:
            rows += [(1, "", title), *((2, kind, text) for kind, text in sites)]
        rows += [(0, "", "methods"), *((1, "yes" if row.applies else "no", str(row)) for row in self.methods)]
        width, height = 8 * max(len(text) for _, _, text in rows) + 3 * INDENT, LINE * (len(rows) + 1)
        size = f'width="{width}" height="{height}" font-family="monospace" font-size="13"'
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="white"/>']
        for number, (depth, kind, text) in enumerate(rows, 1):
            x, y, colour = INDENT * depth + 8, LINE * number, COLOURS.get(kind, "#888888")
            style = 'font-weight="bold"'
            if kind:
                parts.append(f'<rect x="{x}" y="{y - 12}" width="14" height="14" rx="3" fill="{colour}"/>')
                x, style = x + INDENT, 'xml:space="preserve"'
            parts.append(f'<text x="{x}" y="{y}" {style}>{html.escape(text)}</text>')
        return "\n".join([*parts, "</svg>"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to an SVG file.

        Raises:
            AdapterError: the file's name does not end with ".svg".

        Example:
            >>> adapters.describe(model).save("sites.svg")
        """
        if Path(path).suffix.lower() != ".svg":
            raise AdapterError(f"save({str(path)!r}): the picture is an SVG file; give a name that ends with '.svg'.")
        Path(path).write_text(self.svg(), "utf-8")


def describe(model: Any, methods: Iterable[Any] | None = None, interface: Any = None) -> Description:
    """Where adapters can sit in a model, and which methods apply to it. The model does not change.

    The methods are tried out on a copy that has the model's parameters, not copies of them.

    Args:
        model: a model with or without support for adapters.
        methods: configurations or their identifiers; default: one of each kind.
        interface: as for ``adapters.init``.

    Example:
        >>> print(adapters.describe(model))
    """
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, torch.nn.Module) else ()
    shared = {id(tensor): tensor for tensor in tensors}
    with torch.random.fork_rng():
        probe = copy.deepcopy(model, shared)
        init(probe, interface=interface)
        identifiers = {config: name for name, config in reversed(ADAPTER_CONFIG_MAP.items())}  # without aliases
        asked = list(identifiers.values())[::-1] if methods is None else methods
        asked = [asked] if isinstance(asked, (str, AdapterConfig)) else asked
        tried = [(_name(method), AdapterConfig.load(method)) for method in asked]
        found = tuple(_tried(probe, name, config) for name, config in tried)
    return Description(type(model).__name__, tuple(_groups(probe.adapter_sites)), found)


def _name(method: Any) -> str:
    return method if isinstance(method, str) else type(method).__name__


def _tried(probe: Any, name: str, config: Any) -> Applicability:
    free = name.replace(".", "_")
    while free in probe.adapters_config:
        free += "_"
    try:
        probe.add_adapter(free, config)
    except AdapterError as error:
        return Applicability(name, reason=str(error))
    places = Counter(site.location for site, _ in probe.adapter_sites.holding(free))
    probe.delete_adapter(free)
    return Applicability(name, tuple(places.items()))


def _groups(sites: SiteMap) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """What is in no layer; then the layers, those that follow each other and have the same sites as one."""
    by_layer: dict[str, list[Site]] = {}
    for site in sites.sites:
        by_layer.setdefault(site.layer_path, []).append(site)
    if outside := by_layer.pop("", []):
        yield "in no layer", tuple(_line(site) for site in outside)
    layers = [
        (block.path, tuple(_line(site) for site in by_layer.get(block.path, ()))) for block in sites.anatomy.blocks
    ]
    for (parent, lines), alike in groupby(layers, lambda layer: (layer[0].rpartition(".")[0], layer[1])):
        names = [path.removeprefix(f"{parent}.") for path, _ in alike]
        several = f" … {names[-1]} ({len(names)} layers)" if len(names) > 1 else ""
        yield f"{parent}.{names[0]}{several}", lines


def _line(site: Site) -> tuple[str, str]:
    """The kind of a site, and what there is to say of it."""
    path = site.module_path.removeprefix(site.layer_path).removeprefix(".") or "."
    role = f" ({site.role})" if site.role and site.role not in (site.location, "other") else ""
    part = f" [{site.part}]" if site.part else ""
    return site.kind, f"{path + part:<40} {site.kind:<10} {site.location}{role}"
