"""The verbs that users call on a model with adapters, each a few lines over its sites."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import sharing
from .checkpoints import adapterhub, setups
from .checkpoints import fusion as fusion_files
from .checkpoints import heads as head_files
from .checkpoints.files import json_job
from .checkpoints.legacy import upgraded_models
from .checkpoints.publishing import PushAdapterToHubMixin
from .combining import CombiningMixin
from .composition import Block, Fuse, Stack, parse_composition
from .configuration.base import AdapterConfig
from .configuration.model_adapters_config import ModelAdaptersConfig
from .configuration.registry import DEFAULT_ADAPTER_CONFIG
from .context import current, keeping_context
from .embeddings import EmbeddingAdaptersMixin
from .errors import AdapterError, CompositionError, ConfigError, UnknownAdapterError, listing
from .interface import INTERFACE_FILE, AdapterModelInterface
from .invertible import InvertibleAdaptersMixin
from .methods import lora_data
from .methods.fusion import DEFAULT_ADAPTERFUSION_CONFIG, AdapterFusionConfig
from .methods.prefix_tuning import eject
from .placement import check_fused, check_layers
from .quantised import keep_differentiable
from .saving import save_model
from .sitemap import SiteMap
from .summary import summary_rows, summary_table
from .topology import outside_maps
from .vocabulary import LookupSite, OutputSite
from .walking import WalkingMixin

if TYPE_CHECKING:
    # transformers' own add_adapter, load_adapter and so on have other signatures; ours take their place.
    Base: Any = object
else:
    Base = object

logger = logging.getLogger(__name__)


class ModelAdaptersMixin(
    CombiningMixin,
    WalkingMixin,
    EmbeddingAdaptersMixin,
    InvertibleAdaptersMixin,
    PushAdapterToHubMixin,
    Base,  # type: ignore[misc]
):
    """A transformers model with adapters; ``adapters.init`` makes one of any model.

    Attributes:
        adapters_config: the configurations of the model's adapters and fusions, shared with its base model.
        adapter_sites: the places where adapters sit, shared with its base model.
    """

    repeats_inputs: bool = True
    adapter_interface: AdapterModelInterface | None = None

    def init_adapters(
        self, adapters_config: ModelAdaptersConfig | None = None, interface: AdapterModelInterface | None = None
    ) -> None:
        """Read where adapters can sit, and make those that the configuration lists (with new weights)."""
        from .wrap import enable

        if interface is not None and interface.base_model:
            self.__dict__["base_model_prefix"] = interface.base_model

        base: Any = self.base_model if interface is None else interface.base_of(self)
        if base is not self and isinstance(base, ModelAdaptersMixin):
            enable(self)
            self.adapters_config, self.adapter_sites = base.adapters_config, base.adapter_sites
            self.follow_heads()
            return
        listed = self.config.__dict__.pop("adapters", None)
        configured = adapters_config or ModelAdaptersConfig(**upgraded_models(listed or {}, self.config))
        sites = SiteMap(base, interface=interface)
        for model in {id(base): base, id(self): self}.values():
            enable(model, interface)
            model.adapters_config, model.adapter_sites = configured, sites
        self.follow_heads()
        for name in configured:
            sites.add(name, configured.members(name))
        for name in configured.fusions:
            config, adapter_names = configured.get_fusion(name)
            if config is not None and not set(configured).isdisjoint(adapter_names or ()):
                sites.add_fusion(Fuse(*(adapter_names or ()), name=name), config)

    def follow_heads(self) -> None:
        """Tell the sites what is outside of the base model now."""
        self.adapter_sites.follow(self.get_output_embeddings(), outside_maps(self))

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """As in transformers; invertible adapters are undone before the new ones."""
        super().set_output_embeddings(new_embeddings)
        self.follow_heads()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            AdapterError: an adapter sits at the embeddings or at the map onto words; its shape is that of now.
        """
        kinds = (LookupSite, OutputSite)
        asked = args or any(value is not None for value in kwargs.values())
        found = {name for site in self.adapter_sites.sites if type(site) in kinds for name in site.adapters}
        if found and asked:
            raise AdapterError(
                f"resize_token_embeddings: the adapters {listing(sorted(found))} sit at the embeddings, and have their "
                "shape; resize before they are added, or delete_adapter first."
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if not found:
            self.adapter_sites.forget(*kinds)
        return embeddings

    # --- adding and deleting ---------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter_name: str, config: Any = None, overwrite_ok: bool = False, set_active: bool = False
    ) -> None:
        """Add an adapter of new weights.

        Args:
            adapter_name: its name, without dots.
            config: an identifier such as "lora", a config string, a dict, a file or an AdapterConfig; default "seq_bn".
            overwrite_ok: replace an adapter of that name.
            set_active: activate it; prediction heads stay as they are.

        Raises:
            AdapterError: the name is taken, the configuration is not valid, or the model has no place for the method.

        Example:
            >>> model.add_adapter("sst-2", config="lora[r=16]")
        """
        loaded = AdapterConfig.load(DEFAULT_ADAPTER_CONFIG if config is None else config)
        if loaded is None:
            raise ConfigError(
                f"add_adapter({adapter_name!r}, config={config!r}): the configuration is empty; leave it out for the "
                f"default, {DEFAULT_ADAPTER_CONFIG!r}, or name one."
            )
        taken = isinstance(adapter_name, str) and adapter_name in self.adapters_config
        if taken and not overwrite_ok:
            raise AdapterError(
                f"add_adapter({adapter_name!r}): An adapter with the name {adapter_name!r} has already been added; "
                "pass overwrite_ok=True to replace it, or choose another name."
            )
        candidate = f"{adapter_name}__new" if taken else adapter_name
        self.adapters_config.add(candidate, loaded)
        try:
            self.adapter_sites.add(candidate, self.adapters_config.members(candidate))
            check_fused(self.adapter_sites, self.adapters_config, adapter_name, candidate)
        except BaseException:
            self.adapters_config.remove(candidate)
            self.adapter_sites.remove(candidate)
            raise
        if taken:  # what is there goes only when its successor is known to fit
            for name in (candidate, adapter_name):
                self.delete_adapter(name)
            self.add_adapter(adapter_name, loaded)
        if set_active:
            ModelAdaptersMixin.set_active_adapters(self, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; deactivates it if it alone is active. An unknown name is logged.

        Example:
            >>> model.delete_adapter("sst-2")
        """
        if adapter_name not in self.adapters_config:
            logger.info("delete_adapter(%r): there is no adapter of that name.", adapter_name)
            return
        if self.active_adapters == Stack(adapter_name):
            ModelAdaptersMixin.set_active_adapters(self, None)
        elif self.active_adapters is not None and adapter_name in self.active_adapters.flatten():
            logger.warning("delete_adapter(%r): %s stays active without it.", adapter_name, self.active_adapters)
        self.adapters_config.remove(adapter_name)
        self.adapter_sites.remove(adapter_name)

    def add_adapter_fusion(
        self,
        adapter_names: Any,
        config: Any = None,
        name: str | None = None,
        overwrite_ok: bool = False,
        set_active: bool = False,
    ) -> None:
        """Add AdapterFusion layers over adapters that the model has.

        Args:
            adapter_names: a Fuse, a list of names or a string of names joined by commas.
            config: "dynamic" (default), "static", a dict or an AdapterFusionConfig.
            name: the fusion's name; by default the adapters' names joined by commas.
            overwrite_ok: replace a fusion of that name.
            set_active: activate the Fuse block.

        Raises:
            AdapterError: a name is unknown or taken. CompositionError: the adapters do not sit at the same places.

        Example:
            >>> model.add_adapter_fusion(["mnli", "qqp"], "static")
        """
        fuse = _fuse(adapter_names, name)
        self._check_names("add_adapter_fusion", fuse)
        loaded = AdapterFusionConfig.load(config or DEFAULT_ADAPTERFUSION_CONFIG)
        if fuse.name in self.adapters_config.fusions:
            if not overwrite_ok:
                raise AdapterError(
                    f"add_adapter_fusion({fuse.name!r}): An AdapterFusion with the name {fuse.name!r} has already been "
                    "added; pass overwrite_ok=True to replace it, or choose another name."
                )
            self.adapter_sites.fusion_places(fuse)
            self.delete_adapter_fusion(fuse)
        self.adapters_config.add_fusion(list(fuse.leaves()), loaded, fuse.name)
        try:
            self.adapter_sites.add_fusion(fuse, loaded)
        except BaseException:
            self.adapters_config.remove_fusion(fuse.name)
            raise
        if set_active:
            ModelAdaptersMixin.set_active_adapters(self, fuse)

    def delete_adapter_fusion(self, adapter_names: Any) -> None:
        """Remove a fusion, given as to ``add_adapter_fusion``; deactivates the setup if it uses it."""
        fuse = _fuse(adapter_names, None)
        if fuse.name not in self.adapters_config.fusions:
            logger.info("delete_adapter_fusion(%r): there is no fusion of that name.", fuse.name)
            return
        if any(block.name == fuse.name for block in _fusions(self.active_adapters)):
            ModelAdaptersMixin.set_active_adapters(self, None)
        self.adapters_config.remove_fusion(fuse.name)
        self.adapter_sites.remove_fusion(fuse.name)

    # --- activating ------------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> Block | None:
        """The composition that is active, or None."""
        return self.adapter_sites.active

    @active_adapters.setter
    def active_adapters(self, adapter_setup: Any) -> None:
        self.set_active_adapters(adapter_setup)

    def set_active_adapters(self, adapter_setup: Any, skip_layers: list[int] | None = None) -> None:
        """Activate adapters in every forward pass until further notice; None deactivates all.

        Args:
            adapter_setup: a name, a composition block or a list.
            skip_layers: layers in which no adapter acts.

        Raises:
            UnknownAdapterError: a name is not an adapter of this model.
            CompositionError: the blocks cannot be nested so, or a fusion is missing.

        Example:
            >>> model.set_active_adapters(Stack("de", "ner"))
        """
        setup = parse_composition(adapter_setup, model_type=self.config.model_type)
        self._check_names("set_active_adapters", setup)
        check_layers(
            self.adapter_sites.anatomy,
            f"set_active_adapters(skip_layers={skip_layers})",
            () if skip_layers is None else skip_layers,
        )
        self.adapter_sites.reset()
        self.adapter_sites.activate(setup, skip_layers)
        self.adapters_config.active_setup = setup
        self.adapters_config.skip_layers = skip_layers

    def _check_names(self, asked: str, setup: Block | None) -> None:
        missing = [name for name in (setup.leaves() if setup else ()) if name not in self.adapters_config]
        if missing:
            raise UnknownAdapterError(
                f"{asked}({missing[0]!r}): No adapter with name {missing[0]!r} found in this model; it has "
                f"{listing(self.adapters_config)}. Add it with add_adapter({missing[0]!r}) or load_adapter."
            )

    def effective_setup(self) -> Block | None:
        """The composition in force in this thread: of the pass, of the innermost AdapterSetup, else the active one."""
        forward = current()
        if forward is not None and forward.sites is self.adapter_sites:
            return forward.setup
        return self.adapter_sites.effective()[0]

    def has_adapters(self) -> bool:
        """Whether the model has any adapter."""
        return len(self.adapters_config) > 0

    @property
    def has_parallel_adapters(self) -> bool:
        """Whether the active setup runs channels in parallel."""
        return self.active_adapters is not None and self.active_adapters.parallel_channels > 1

    @property
    def model_name(self) -> str:
        """The name or path that the model was loaded from."""
        return str(self.config.name_or_path)

    def set_adapter(self, adapter_name: Any) -> None:
        """transformers' name for ``set_active_adapters``."""
        self.set_active_adapters(adapter_name)

    def disable_adapters(self) -> None:
        """transformers' name for ``set_active_adapters(None)``."""
        self.set_active_adapters(None)

    def enable_adapters(self) -> None:
        """transformers' counterpart of ``disable_adapters``; here a setup has to be named.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            "enable_adapters(): which adapters act is said by name here; call set_active_adapters with one of "
            f"{listing(self.adapters_config)} or a composition of them."
        )

    # --- training --------------------------------------------------------------------------------------------------

    @property
    def model_frozen(self) -> bool:
        """Whether the pretrained weights are frozen."""
        return self.adapter_sites.frozen

    def freeze_model(self, freeze: bool = True) -> None:
        """Freeze (or with False train) every parameter of the base model; heads stay as they are."""
        tables = (table.weight for table in self.loaded_embeddings.values())
        for parameter in (*tables, *self.base_model.parameters()):
            if parameter.dtype.is_floating_point:
                parameter.requires_grad = not freeze
        self.adapter_sites.frozen = freeze

    def train_adapter(self, adapter_setup: Any, train_embeddings: bool = False) -> None:
        """Train the adapters of a setup and nothing else of the base model, and activate the setup.

        Raises:
            UnknownAdapterError: a name is not an adapter of this model; nothing was changed then.

        Example:
            >>> model.train_adapter("sst-2")
        """
        if not adapter_setup:
            raise AdapterError(
                f"train_adapter({adapter_setup!r}): it names no adapter; give one of {listing(self.adapters_config)} "
                "or a composition of them. freeze_model() freezes the model without training an adapter."
            )
        ModelAdaptersMixin.set_active_adapters(self, adapter_setup)
        self.train()
        self.freeze_model(True)
        keep_differentiable(self)
        for name in self.active_adapters.flatten() if self.active_adapters else ():
            for module in self._modules_of(name):
                module.requires_grad_(True)
        if train_embeddings:
            self.get_input_embeddings().requires_grad_(True)
        else:
            self.freeze_embeddings()

    def train_adapter_fusion(self, adapter_setup: Any, unfreeze_adapters: bool = False) -> None:
        """Train the fusion layers of a setup, with `unfreeze_adapters` its adapters too, and activate it.

        Raises:
            CompositionError: a fusion is missing; nothing was changed then.

        Example:
            >>> model.train_adapter_fusion(Fuse("mnli", "qqp"))
        """
        setup = parse_composition(adapter_setup)
        fusions = _fusions(setup)
        if not fusions:
            raise CompositionError(
                f"train_adapter_fusion({adapter_setup!r}): it has no Fuse block, so that there is no fusion to train; "
                "give Fuse(…) or a Stack with one, or call train_adapter."
            )
        self.train_adapter(setup)
        if not unfreeze_adapters:
            self.freeze_model(True)
        for fuse in fusions:
            for site in self.adapter_sites.fusion_sites(fuse.name):
                site.fusions[fuse.name].requires_grad_(True)

    def freeze_embeddings(self, freeze: bool = True) -> None:
        """Freeze (or with False train) the output embeddings, where the model has a language modeling head."""
        found = self.get_output_embeddings() if self is not self.base_model else None
        for embeddings in found if isinstance(found, list) else [found]:
            if embeddings is not None:
                embeddings.requires_grad_(not freeze)

    def initialize_lora(
        self, adapter_name: str, batches: Iterable[Mapping[str, Any]], method: str | None = None
    ) -> None:
        """Start a LoRA from what the model does with some data, before it is trained.

        Args:
            adapter_name: a LoRA of this model; its matrices are set anew.
            batches: inputs of the model as dicts, all of them used; with "lora_ga" they need labels.
            method: "eva", the principal components of the inputs of each map, or "lora_ga", the gradient of the loss;
                by default the configuration's ``init_weights``.

        Raises:
            AdapterError: there is no such LoRA, there are too few rows for its rank, or the method does not fit.

        Example:
            >>> model.add_adapter("sst-2", LoRAConfig(init_weights="eva"))
            >>> model.initialize_lora("sst-2", itertools.islice(loader, 16))
        """
        lora_data.initialize_lora(self, adapter_name, batches, method)

    def get_fusion_regularization_loss(self) -> Tensor | None:
        """Sum of 0.01 ||I - V||^2 over fusion layers with `regularization` and a trained V; None without one."""
        losses = [loss for layer in self.adapter_sites.fusion_layers() if (loss := layer.regularisation()) is not None]
        return torch.stack(losses).sum() if losses else None

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """As in transformers; a layer that is run again in the backward pass sees the pass it belongs to."""
        checkpoint = kwargs.get("gradient_checkpointing_func", torch.utils.checkpoint.checkpoint)

        def checkpoint_in_context(function: Any, *args: Any, **arguments: Any) -> Any:
            return checkpoint(keeping_context(function), *args, **arguments)

        kwargs["gradient_checkpointing_func"] = checkpoint_in_context
        super()._set_gradient_checkpointing(enable, **kwargs)
        self.adapter_sites.require_input_gradients(enable)

    # --- sharing and ejecting --------------------------------------------------------------------------------------

    def share_parameters(
        self, adapter_names: Any, name: str | None = None, reference_adapter_name: str | None = None
    ) -> None:
        """Let MTL-LoRAs have their ``lora_A`` and ``lora_B`` in common, those of the reference (default: the first).

        Args:
            adapter_names: names, in a list, joined by commas or in a ``MultiTask`` block.
            name: what the set is called; default: the names, joined by commas.

        Raises:
            AdapterError: a name is unknown, or the adapters do not fit; nothing was changed then.
        """
        sharing.share(self.adapter_sites, self.adapters_config, adapter_names, name, reference_adapter_name)

    def unshare_parameters(self, name: str) -> None:
        """Give each adapter of the set `name` its own copy of what it shared."""
        sharing.unshare(self.adapter_sites, name)

    def eject_prefix_tuning(self, name: str) -> None:
        """Make an adapter's prefixes flat: the outputs stay, and the network that the prefixes come from goes.

        Raises:
            AdapterError: the model has no adapter of that name, or it has no prefix.

        Example:
            >>> model.eject_prefix_tuning("sst-2")
        """
        self._check_names("eject_prefix_tuning", parse_composition(name))
        eject(name, self._modules_of(name))
        self.adapters_config.change(name, flat=True)

    # --- looking ---------------------------------------------------------------------------------------------------

    def get_adapter(self, name: str) -> dict[int, dict[str, nn.Module]]:
        """The modules of an adapter: layer -> location -> module; -1 holds what belongs to no layer.

        Several modules of one location are a ModuleList; a prefix is a ModuleDict of `prefix` (in the first layer of
        its kind) and `gate`. An unknown name gives an empty dict.
        """
        return self.adapter_sites.by_layer(name)

    def _modules_of(self, name: str) -> Iterator[nn.Module]:
        for _, module in self.adapter_sites.holding(name):
            yield module
        yield from self.adapter_sites.shared(name).values()

    def adapter_to(self, name: str, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Move an adapter to a device or dtype."""
        for module in self._modules_of(name):
            module.to(device=device, dtype=dtype)

    def adapter_fusion_to(self, adapter_names: Any, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Move the layers of a fusion to a device or dtype."""
        name = _fuse(adapter_names, None).name
        for site in self.adapter_sites.fusion_sites(name):
            site.fusions[name].to(device=device, dtype=dtype)

    def adapter_summary(self, as_dict: bool = False) -> str | list[dict[str, Any]]:
        """A table of the adapters with their parameter counts, or its rows.

        Example:
            >>> print(model.adapter_summary())
        """
        rows = summary_rows(self)
        return rows if as_dict else summary_table(rows)

    # --- saving and loading ----------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the whole model; adapters, fusions and heads are in it. ``adapters.load_model`` reads them back.

        The weights are saved without a merged adapter, which is in the files itself. All files are written or none.
        """
        self.config.adapters = self.adapters_config.to_dict()
        try:
            with self.adapter_sites.merging(None):
                save_model(save_directory, super().save_pretrained, **kwargs)
        finally:
            del self.config.adapters
        if (interface := self.adapter_sites.anatomy.interface) is not None:
            job = json_job(save_directory, interface.content(self.config.model_type))
            job(Path(save_directory, INTERFACE_FILE))

    def save_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str,
        with_head: bool = True,
        meta_dict: Mapping[str, Any] | None = None,
        custom_weights_loaders: Any = None,
        use_safetensors: bool = True,
        format: str = adapterhub.NATIVE,
    ) -> None:
        """Save an adapter, and the head of its name, to a folder. See ``checkpoints.adapterhub.save_adapter``."""
        options = with_head, meta_dict, custom_weights_loaders, use_safetensors, format
        adapterhub.save_adapter(self, save_directory, adapter_name, *options)

    def load_adapter(self, adapter_name_or_path: str | os.PathLike[str], config: Any = None, **kwargs: Any) -> str:
        """Load an adapter from a folder or the Hub; returns its name. See ``checkpoints.adapterhub.load_adapter``."""
        return adapterhub.load_adapter(self, adapter_name_or_path, config, **kwargs)

    def save_all_adapters(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save every adapter to a folder of its own. See ``checkpoints.adapterhub.save_all_adapters``."""
        adapterhub.save_all_adapters(self, save_directory, **kwargs)

    def save_adapter_fusion(self, save_directory: str | os.PathLike[str], adapter_names: Any, **kwargs: Any) -> None:
        """Save a fusion. See ``checkpoints.fusion.save_adapter_fusion``."""
        fusion_files.save_adapter_fusion(self, save_directory, adapter_names, **kwargs)

    def load_adapter_fusion(self, adapter_fusion_name_or_path: str | os.PathLike[str], **kwargs: Any) -> str:
        """Load a fusion whose adapters the model has. See ``checkpoints.fusion.load_adapter_fusion``."""
        return fusion_files.load_adapter_fusion(self, adapter_fusion_name_or_path, **kwargs)

    def save_all_adapter_fusions(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save every fusion to a folder of its own. See ``checkpoints.fusion.save_all_adapter_fusions``."""
        fusion_files.save_all_adapter_fusions(self, save_directory, **kwargs)

    def save_adapter_setup(self, save_directory: str | os.PathLike[str], adapter_setup: Any, **kwargs: Any) -> None:
        """Save a setup with all that it uses. See ``checkpoints.setups.save_adapter_setup``."""
        setups.save_adapter_setup(self, save_directory, adapter_setup, **kwargs)

    def load_adapter_setup(self, adapter_setup_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a setup with all that it uses. See ``checkpoints.setups.load_adapter_setup``."""
        return setups.load_adapter_setup(self, adapter_setup_name_or_path, **kwargs)

    def save_head(self, save_directory: str | os.PathLike[str], head_name: str | None = None, **kwargs: Any) -> None:
        """Save a prediction head. See ``checkpoints.heads.save_head``."""
        head_files.save_head(self, save_directory, head_name, **kwargs)

    def load_head(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a prediction head. See ``checkpoints.heads.load_head``."""
        return head_files.load_head(self, save_directory, **kwargs)


def _fuse(adapter_names: Any, name: str | None) -> Fuse:
    if isinstance(adapter_names, Fuse):
        return adapter_names if name is None else Fuse(*adapter_names.children, name=name)
    if isinstance(adapter_names, str):
        adapter_names = adapter_names.split(",")
    if isinstance(adapter_names, (list, tuple)):
        return Fuse(*adapter_names, name=name)
    raise AdapterError(
        f"Invalid AdapterFusion definition: {adapter_names!r}; give a Fuse, a list of names, or the names joined "
        "by commas."
    )


def _fusions(setup: Block | None) -> list[Fuse]:
    return [block for block in setup.blocks() if isinstance(block, Fuse)] if setup else []
