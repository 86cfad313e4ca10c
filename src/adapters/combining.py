"""The verbs that combine adapters with the weights of the model, and with each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from . import averaging
from .composition import Stack, parse_composition
from .configuration.model_adapters_config import ModelAdaptersConfig
from .errors import AdapterError, listing
from .sitemap import SiteMap

if TYPE_CHECKING:
    from .model import ModelAdaptersMixin


class CombiningMixin:
    """A model's adapters, merged into its weights or averaged."""

    adapters_config: ModelAdaptersConfig
    adapter_sites: SiteMap

    @property
    def _model(self) -> ModelAdaptersMixin:
        return cast("ModelAdaptersMixin", self)

    def merge_adapter(self, adapter_name: Any, delete_adapter: bool = False) -> None:
        """Work an adapter into the weights: it acts in every pass at no cost, whatever is active.

        ``reset_adapter``, ``set_active_adapters`` and what calls it put back the stored weights, bit for bit.

        Args:
            adapter_name: an adapter of which all modules can be merged, such as LoRA or (IA)³ without gates; or a
                ``Stack`` or ``Average`` of such adapters.
            delete_adapter: remove the adapters and keep the merged weights for good.

        Raises:
            UnknownAdapterError: the model has no adapter of that name.
            AdapterError: it cannot be merged, or another one is; nothing was changed then.

        Example:
            >>> model.merge_adapter("sst-2")
        """
        setup = parse_composition(adapter_name)
        if setup is None:
            raise AdapterError(
                f"merge_adapter({adapter_name!r}): it names no adapter; give one of {listing(self.adapters_config)}."
            )
        self._model._check_names("merge_adapter", setup)
        self.adapter_sites.merge(setup.first() if setup == Stack(setup.first()) else setup)
        if delete_adapter:
            self.adapter_sites.reset(keep=True)
            for name in setup.flatten():
                self._model.delete_adapter(name)

    def reset_adapter(self) -> None:
        """Take what is merged, if anything is, out of the weights; they are what they were, bit for bit."""
        self.adapter_sites.reset()

    def save_merged(
        self,
        save_directory: str | os.PathLike[str],
        adapter_setup: Any = None,
        head_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model with adapters in its weights, as a plain model of transformers: no trace of them is left.

        ``AutoModel….from_pretrained`` loads it with equal outputs. This model stays as it is.

        Args:
            adapter_setup: an adapter, or a Stack or Average of some; by default what is merged, else what is active.
            head_name: of an XAdapterModel, the head to save it with; by default the active one, without one the base
                model is saved.
            kwargs: as for ``save_pretrained`` of transformers, such as ``max_shard_size``.

        Raises:
            AdapterError: nothing is active, a method cannot be merged, or transformers has no class with this head.

        Example:
            >>> model.save_merged("out", "sst-2")
            >>> AutoModelForSequenceClassification.from_pretrained("out")
        """
        from .exporting import save_merged

        save_merged(self._model, save_directory, adapter_setup, head_name, **kwargs)

    def average_adapter(
        self,
        adapter_name: str,
        adapter_list: Any,
        weights: Sequence[float] | None = None,
        combine_strategy: str = "linear",
        normalize_weights: bool = True,
        overwrite_ok: bool = False,
        set_active: bool = False,
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is an average, or another combination, of others.

        Args:
            adapter_list: names, or weights by name.
            weights: a number for each, which may be negative; by default all count the same.
            combine_strategy: one of the table in docs/merging.md, such as "linear" or "ties", or PEFT's name of one.
            normalize_weights: divide the weights by their sum; where signs are elected, by their mean.
            svd_rank: the rank of the result, for those that decompose a change; by default the largest one.
            density: the share of values to keep, for those that drop some.
            majority_sign_method: elect the sign with the larger sum, "total", or the one that more adapters have,
                "frequency".

        Raises:
            UnknownAdapterError: the model has no such adapter.
            AdapterError: the adapters do not fit each other or the strategy; nothing was changed then.

        Example:
            >>> model.average_adapter("both", {"mnli": 1, "qqp": 0.5}, combine_strategy="ties", density=0.2)
        """
        strategy = averaging.Strategy(combine_strategy, svd_rank, density, majority_sign_method)
        shares = averaging.Shares.of(
            "average_adapter", adapter_list, weights, normalize_weights, by_mean=strategy.mixing.elects
        )
        averaging.average_adapter(self._model, adapter_name, shares, strategy, overwrite_ok, set_active)
