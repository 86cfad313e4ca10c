"""Building an adapter's modules where its configuration wants them, with a message where that is not possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .configuration.base import AdapterConfig
from .configuration.model_adapters_config import ModelAdaptersConfig
from .containers import child, child_dict, remove_child
from .errors import AdapterError, listing
from .interface import AdapterMethod
from .method import AdapterModule, methods_of, seeded
from .sharded import computed_in_parts, device_at
from .sites import Site
from .sublayers import SublayerSite
from .topology import Anatomy

if TYPE_CHECKING:
    from .sitemap import SiteMap


def place(sites: SiteMap, name: str, config: AdapterConfig) -> None:
    """Build the modules of an adapter at every site that `config` wants.

    Raises:
        AdapterError: there is none, or one is taken.
    """
    _check_described(sites, name, config)
    left_out = config.get("leave_out") or ()
    check_layers(sites.anatomy, f"add_adapter({name!r}, {type(config).__name__}(leave_out={left_out}))", left_out)
    _check_asked(sites, name, config)
    _check_modules(sites, name, config)
    every = [site for method in methods_of(config) for site in sites.of(method.site_type)]
    config.check_sites([site for site in every if _is_in(sites, site.module_path, config.modules)])
    found = [place_method(sites, name, config, method) for method in methods_of(config)]
    if not any(found):
        _refuse(sites, name, config)


def place_method(sites: SiteMap, name: str, config: AdapterConfig, method: type[AdapterModule[Any]]) -> bool:
    """Build a method's modules; False if it wants none."""
    wanted = [site for site in sites.of(method.site_type) if method.wants(config, site)]
    places = [site for site in wanted if _is_in(sites, site.module_path, config.modules)]
    if wanted and not places:
        raise AdapterError(
            f"add_adapter({name!r}, {type(config).__name__}(modules={config.modules})): all places of its "
            f"{method.__name__} are outside of these, such as {wanted[0].module_path or 'the whole'!r}; name them."
        )
    taken = [site for site in places if name in site.adapters]
    if taken:
        raise AdapterError(
            f"add_adapter({name!r}): Multiple adapter definitions conflict: two members of the union want a "
            f"module at {taken[0].path}; give them different locations or leave_out."
        )
    with seeded(config.get("init_weights_seed")):
        shared = method.share(config, places) if places else None
    if shared is not None:
        if method.shared_container in sites.shared_modules[name]:
            raise AdapterError(
                f"add_adapter({name!r}): two members of the union have something that their modules share, under "
                f"one name, {method.shared_container}; add one of them as an adapter of its own and use Stack."
            )
        _put_shared(sites, method.shared_container, name, shared, config.get("dtype") is not None)
    else:  # what another class of the method made
        shared = sites.shared_modules[name].get(method.shared_container)
    for site in places:
        _check_host(sites.base_model, name, site)
        with seeded(config.get("init_weights_seed")):
            module = method(config, site, shared)
        like(site, module, keep_dtype=config.get("dtype") is not None)
        site.put(name, module)
    return bool(places)


def _is_in(sites: SiteMap, path: str, parts: Iterable[str] | None) -> bool:
    """Whether a module is in one of these parts, by their names or as patterns of paths; None: in all."""
    if parts is None:
        return True
    first = path.partition(".")[0]
    names = {
        first,
        *first.split("_"),
        *(name for below, name in sites.anatomy.towers if f"{path}.".startswith(f"{below}.")),
    }
    return any(part in names or fnmatchcase(path, part) or fnmatchcase(path, f"{part}.*") for part in parts)


def _check_modules(sites: SiteMap, name: str, config: AdapterConfig) -> None:
    for part in config.modules or ():
        if not any(_is_in(sites, path, [part]) for path, _ in sites.base_model.named_modules()):
            known = dict.fromkeys([tower for _, tower in sites.anatomy.towers] + list(sites.base_model._modules))
            raise AdapterError(
                f"add_adapter({name!r}, {type(config).__name__}(modules={config.modules})): {part!r} is no part of "
                f"{type(sites.base_model).__name__}; its parts are {listing(known)}. A pattern of paths works too."
            )


def _check_asked(sites: SiteMap, name: str, config: AdapterConfig) -> None:
    methods = methods_of(config)
    known = {site.location for method in methods for site in sites.of(method.site_type)}
    without_meaning = set() if sites.anatomy.crosses else {SublayerSite.locations["cross_attention"]}
    asked = {location for method in methods for location in method.asks_for(config)}
    missing = sorted(asked - known - without_meaning) if known else []
    if missing:
        raise AdapterError(
            f"add_adapter({name!r}, {type(config).__name__}): {type(sites.base_model).__name__} has no site for "
            f"{listing(missing)}; found were {listing(sorted(known))}. Switch the others off in the configuration."
        )


def _check_described(sites: SiteMap, name: str, config: AdapterConfig) -> None:
    """Of a described model the user says which methods it has."""
    interface = sites.anatomy.interface
    for method in () if interface is None else AdapterMethod.get_from_config(config):
        if interface is not None and method not in interface.adapter_methods:
            raise AdapterError(
                f"add_adapter({name!r}, {type(config).__name__}): the model's interface has no {method!r} among its "
                f"adapter_methods, {listing(interface.adapter_methods)}; add it there."
            )


def check_layers(anatomy: Anatomy, asked: str, layers: Iterable[int]) -> None:
    """Refuse numbers that no layer of the model has; layers that share their weights have one number each."""
    if not isinstance(layers, (list, tuple, set, frozenset)) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterError(f"{asked}: layers are given as a list of whole numbers, such as [0, 1].")
    unknown = sorted(layer for layer in layers if not 0 <= layer < anatomy.depth)
    if unknown and anatomy.blocks:
        raise AdapterError(
            f"{asked}: {type(anatomy.base_model).__name__} has no layer {unknown[0]}; its layers are 0 to "
            f"{anatomy.depth - 1}."
        )


def check_fused(sites: SiteMap, known: ModelAdaptersConfig, name: str, successor: str) -> None:
    """Refuse a successor of a fused adapter that does not sit at the places of the one that is there.

    Raises:
        AdapterError: it does not.
    """
    fused = [fusion for fusion in known.fusions if name in (known.get_fusion(fusion)[1] or ())]
    places, others = ({id(site) for site, _ in sites.holding(each)} for each in (name, successor))
    if fused and name in sites and places != others:
        raise AdapterError(
            f"overwriting {name!r}: it is fused in {fused[0]!r}, whose layers stand where it sits, and its successor "
            f"sits at other places; delete_adapter_fusion({fused[0]!r}) first, or take another name."
        )


def _check_host(base_model: nn.Module, name: str, site: Site) -> None:
    if not site.is_current(base_model):
        raise AdapterError(
            f"add_adapter({name!r}): the module at {site.host_path} is not the one that adapters.init saw; change "
            "modules before adapters.init."
        )
    if site.kind in ("linear", "attention") and computed_in_parts(site.host):
        raise AdapterError(
            f"add_adapter({name!r}): tensor parallelism computes {site.host_path} in parts, one in each process, where "
            "this method needs all of it; add a bottleneck, ReFT, prompt or invertible adapter, or load the model "
            "without tp_plan (FSDP shares it out too, and takes every method)."
        )


def _refuse(sites: SiteMap, name: str, config: AdapterConfig) -> None:
    kinds = {method.site_type for method in methods_of(config)}
    known = sorted({site.location for kind in kinds for site in sites.of(kind)})
    if not known:
        wanted = {kind.kind for kind in kinds}
        raise AdapterError(
            f"add_adapter({name!r}, {type(config).__name__}): no {' or '.join(sorted(wanted))} site, which the method "
            f"needs, was found in {type(sites.base_model).__name__}; docs/architectures.md shows which methods work on "
            "which models."
        )
    raise AdapterError(
        f"add_adapter({name!r}, {type(config).__name__}): no place for it in {type(sites.base_model).__name__}; "
        f"this model has the locations {listing(known)} for the method. Switch one of them on in the "
        "configuration, or check leave_out."
    )


def _put_shared(sites: SiteMap, container: str, name: str, module: nn.Module, keep_dtype: bool) -> None:
    factory = _factory(sites.base_model, next(sites.base_model.parameters()), keep_dtype)
    module.to(**factory).train(sites.base_model.training)
    parent = sites.base_model
    *above, last = container.split(".")
    for part in above:
        parent = child(parent, part)
    child_dict(parent, last)[name] = module
    sites.shared_modules[name][container] = module


def drop_shared(base_model: nn.Module, container: str, name: str) -> None:
    """Remove what the modules of an adapter share, and the containers that are empty then."""
    parts = container.split(".")
    modules: Any = base_model.get_submodule(container)
    del modules[name]
    for depth in range(len(parts), 0, -1):
        parent = base_model.get_submodule(".".join(parts[: depth - 1])) if depth > 1 else base_model
        remove_child(parent, parts[depth - 1])


def _factory(host: nn.Module, reference: torch.Tensor, keep_dtype: bool) -> Mapping[str, Any]:
    dtype = {"dtype": reference.dtype} if reference.dtype.is_floating_point and not keep_dtype else {}
    return {"device": device_at(host, reference), **dtype}


def like(site: Site, module: nn.Module, keep_dtype: bool) -> None:
    """Give a new module the device, dtype and mode of its host; moving is slow, so it is done only where it is due."""
    factory = _factory(site.host, site.reference, keep_dtype)
    tensors: Iterable[torch.Tensor] = chain(module.parameters(), module.buffers())
    if not module._modules:
        tensors = filter(torch.is_tensor, chain(module._parameters.values(), module._buffers.values()))
    for tensor in tensors:
        if tensor.device != factory["device"] or tensor.dtype != factory.get("dtype", tensor.dtype):
            module.to(**factory)
            break
    if not site.host.training and module._modules:
        module.eval()
    elif not site.host.training:
        vars(module)["training"] = False  # eval() takes ten times as long
