"""One adapter on its way between the two libraries, and where it sits in the terms of each."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...configuration import AdapterConfig
from ...errors import CheckpointError, listing
from ...methods.patterns import is_placed
from ...sites import LinearSite, Site
from .. import names

if TYPE_CHECKING:
    from ...model import ModelAdaptersMixin

Tensors = dict[str, Tensor]
Options = dict[str, Any]


@dataclass
class Draft:
    """An adapter, with the names of the one library when it is given to a form and of the other one afterwards.

    Attributes:
        model: The model that it is of or for.
        asked: The call, for messages.
        name: What it is called in the model.
        options: PEFT's configuration.
        fields: Ours.
        parts: Its tensors at each site.
        shared: Those that its modules have in common.
        headed: PEFT's model has a head, so that the paths of its modules begin with the name of the base model.
        alone: It is read without the model it was trained with: changes of base weights have to be made again.
    """

    model: "ModelAdaptersMixin"
    asked: str
    name: str
    options: Options = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    parts: dict[Site, Tensors] = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    alone: bool = True
    headed: bool = True

    def refusal(self, option: str, reason: str) -> CheckpointError:
        """The error about an option, or a field, that the other library cannot express."""
        value = self.options.get(option, self.fields.get(option))
        return CheckpointError(f"{self.asked}: {option}={value!r} cannot be mapped; {reason}.")

    def path(self, site: Site) -> str:
        """The path of a site's module as PEFT sees it."""
        if site.place.outside or not self.headed or self.model.base_model is self.model:
            return str(site.module_path)
        return f"{self.model.base_model_prefix}.{site.host_path}"

    def change(self, alter: Callable[[Site, Tensors], Tensors]) -> None:
        """Replace the tensors of every site."""
        self.parts = {site: alter(site, own) for site, own in self.parts.items()}


def sites_by_path(model: "ModelAdaptersMixin", kinds: Iterable[type[Site]]) -> dict[str, Site]:
    """Whole modules by their path in the base model, under the names of transformers 4 too."""
    found: dict[str, Site] = {}
    for kind in kinds:
        for site in model.adapter_sites.of(kind):
            if not site.part:
                found.setdefault(site.module_path, site)
                if isinstance(site, LinearSite) and not site.place.outside:
                    found.setdefault(names.container_path(model.config.model_type, site), site)
    return found


def placement(kind: type[AdapterConfig], chosen: Iterable[Site], every: Iterable[Site]) -> dict[str, Any]:
    """The fields that put a linear method at exactly these sites: flags where they can say it, paths where not."""
    wanted, every = set(chosen), list(every)
    flags: dict[str, Any] = {
        site.location: False
        for site in every
        if site.location in kind.field_names() and site.location != "target_modules"
    }
    if all(site.location in flags for site in wanted):
        flags |= dict.fromkeys((site.location for site in wanted), True)
        letters = [letter for letter in "qkvo" if any(site.role == letter for site in wanted)]
        flags |= {"attn_matrices": letters} if letters else {}
        left_out = {site.layer for site in every} - {site.layer for site in wanted} - {-1}
        flags["leave_out"] = sorted(left_out)
        asked: Mapping[str, Any] = {"attn_matrices": [], "target_modules": None, **flags}
        if {site for site in every if is_placed(asked, site)} == wanted:
            return flags
    paths = {site.module_path for site in every if not site.part}
    return {"target_modules": shortest({site.module_path for site in wanted}, paths)}


def shortest(wanted: set[str], every: Iterable[str]) -> list[str]:
    """Ends of paths that name exactly the wanted ones: their last names, the last two, or the whole."""
    every = list(every)
    for depth in (1, 2):
        ends = {".".join(path.split(".")[-depth:]) for path in wanted}
        if {path for path in every if any(path == end or path.endswith(f".{end}") for end in ends)} == wanted:
            return sorted(ends)
    return sorted(wanted)


def first_fit(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of a pattern of PEFT at a module: of several keys that fit, the first one counts."""
    fitting = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(fitting, default)


def some(paths: Iterable[str]) -> str:
    """A few of many names, for messages."""
    found = sorted(paths)
    return listing(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
