"""Walks over the layers of a model, and the question which methods it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .configuration.base import AdapterConfig
from .errors import AdapterError
from .sitemap import SiteMap
from .sites import Site

CONFIGS = {"bottleneck": "seq_bn", "reft": "loreft", "invertible": "seq_bn_inv"}
"""Identifiers of configurations for the methods that have none of their name."""


class WalkingMixin:
    """A model's layers, numbered as ``leave_out`` counts them."""

    adapter_sites: SiteMap

    def iter_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """The layers with their numbers, of an encoder-decoder the encoder's first."""
        for block in self.adapter_sites.anatomy.blocks:
            yield block.layer, block.module

    def get_layer(self, idx: int) -> nn.Module:
        """The layer of that number.

        Raises:
            AdapterError: there is none.
        """
        layers = dict(self.iter_layers())
        if idx not in layers:
            raise AdapterError(f"get_layer({idx!r}): the layers are 0 to {len(layers) - 1}.")
        return layers[idx]

    def iter_attentions(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Every attention with its layer's number and "self" or "cross"."""
        for block in self.adapter_sites.anatomy.blocks:
            for core in block.cores:
                yield block.layer, core.role.removesuffix("_attention"), core.module

    def iter_layer_ffns(self) -> Iterator[tuple[int, str, nn.Module]]:
        """The two maps of every feed-forward block with its layer's number, and "intermediate" or "output"."""
        for block in self.adapter_sites.anatomy.blocks:
            for role, found in block.feed_forward.items():
                yield block.layer, role, found.module

    def apply_to_adapter_layers(self, fn: Callable[[int, Site], Any]) -> None:
        """Call `fn` with the layer's number and the site, for every site in a layer that has adapters."""
        for site in (site for site in self.adapter_sites.sites if site.adapters and site.layer >= 0):
            fn(site.layer, site)

    def apply_to_basemodel_childs(self, fn: Callable[[int, Site], Any]) -> None:
        """Call `fn` with -1 and the site, for every site outside of the layers that has adapters."""
        for site in (site for site in self.adapter_sites.sites if site.adapters and site.layer < 0):
            fn(site.layer, site)

    def supports_adapter(self, type_or_config: str | AdapterConfig) -> bool:
        """Whether ``add_adapter`` takes a configuration; a string names a method, or a configuration.

        ``adapters.describe`` says why not.

        Example:
            >>> model.supports_adapter("prefix_tuning")
        """
        from .describing import describe

        asked = CONFIGS.get(type_or_config, type_or_config) if isinstance(type_or_config, str) else type_or_config
        (tried,) = describe(self, [AdapterConfig.load(asked)]).methods
        return tried.applies
