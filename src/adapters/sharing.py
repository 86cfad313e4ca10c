"""Parameters that several adapters have in common, such as the matrices of MTL-LoRA that all tasks train."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .composition import MultiTask
from .configuration.model_adapters_config import ModelAdaptersConfig
from .errors import AdapterError, UnknownAdapterError, listing
from .method import AdapterModule
from .sitemap import SiteMap


def share(
    sites: SiteMap,
    configs: ModelAdaptersConfig,
    adapter_names: MultiTask | Sequence[str] | str,
    name: str | None,
    reference: str | None,
) -> None:
    """See ``ModelAdaptersMixin.share_parameters``."""
    asked = f"share_parameters({adapter_names!r})"
    if isinstance(adapter_names, MultiTask):
        adapter_names = [str(child) for child in adapter_names.children]
    names = adapter_names.split(",") if isinstance(adapter_names, str) else list(adapter_names)
    reference = reference or (names[0] if names else "")
    if unknown := [each for each in names if each not in configs]:
        raise UnknownAdapterError(
            f"{asked}: No configuration found for adapter {unknown[0]!r}; this model has {listing(configs)}. "
            "Add it with add_adapter."
        )
    if reference not in names:
        raise AdapterError(f"{asked}: the reference {reference!r} is not one of {listing(names)}; name one of them.")
    modules = {each: _modules(sites, each) for each in names}
    for each, others in modules.items():
        if {key: _shapes(module) for key, module in others.items()} != {
            key: _shapes(module) for key, module in modules[reference].items()
        }:
            raise AdapterError(
                f"{asked}: {each!r} and {reference!r} differ in places or sizes; adapters that share need the same "
                "locations, leave_out, r and number of up-projections."
            )
        if not others or not all(module.common for module in others.values()):
            raise AdapterError(
                f"{asked}: {each!r} is a {type(configs.get(each)).__name__}, whose parameters cannot be shared; "
                "those of MTLLoRAConfig can."
            )
    for index, source in modules[reference].items():
        for others in modules.values():
            for common in source.common:
                setattr(others[index], common, source.get_parameter(common))
    sites.in_common[name or ",".join(names)] = tuple(names)


def unshare(sites: SiteMap, name: str) -> None:
    """See ``ModelAdaptersMixin.unshare_parameters``."""
    if name not in sites.in_common:
        raise UnknownAdapterError(
            f"unshare_parameters({name!r}): nothing is shared under this name; known are {listing(sites.in_common)}."
        )
    _, *others = sites.in_common.pop(name)
    for each in others:
        for module in _modules(sites, each).values():
            for common in module.common:
                own = module.get_parameter(common)
                setattr(module, common, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))


def _modules(sites: SiteMap, name: str) -> dict[int, AdapterModule[Any]]:
    return {site.index: module for site, module in sites.holding(name)}


def _shapes(module: AdapterModule[Any]) -> list[tuple[int, ...]]:
    return [tuple(module.get_parameter(common).shape) for common in module.common]
