"""All sites of one model: adding and removing adapters is a loop over them, written once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import methods as methods  # fills the table of methods
from .composition import Block, Fuse, Setup, Stack
from .configuration.base import AdapterConfig
from .context import START, AdapterSetup, Position, state
from .described import described_blocks
from .errors import AdapterError, CompositionError, UnknownAdapterError, listing
from .fused import with_layouts
from .interface import AdapterModelInterface
from .merging import Merge
from .method import AdapterModule, methods_of
from .methods.fusion import AdapterFusionConfig, Fusion
from .methods.prefix_tuning import Prefix
from .placement import drop_shared, like, place, place_method
from .repetition import SharedRows
from .sites import LinearSite, Site
from .streams import EmbeddingSite
from .sublayers import SublayerSite
from .topology import Anatomy, Linear, read_blocks

T = TypeVar("T", bound=Site)
SETUPS = 256
"""Of so many setups the plans are kept; rows of a batch may name ever new ones."""


class SiteMap:
    """The sites of one base model, the adapters' shared modules, and the composition that is active."""

    def __init__(self, base_model: nn.Module, interface: AdapterModelInterface | None = None) -> None:
        """Read the model's structure; sites of a class are found when they are first asked for.

        interface: what the user says of the model, in place of what would be read.
        """
        blocks = read_blocks(base_model) if interface is None else described_blocks(base_model, interface)
        self.anatomy = Anatomy(base_model, with_layouts(base_model, blocks), interface=interface)
        self.sites: list[Site] = []
        self._read: set[type[Site]] = set()
        self.shared_modules: dict[str, dict[str, nn.Module]] = {}
        self.in_common: dict[str, tuple[str, ...]] = {}
        self.entrances: OrderedDict[int, Any] = OrderedDict()
        self.frozen = False
        self._merge: Merge | None = None
        self._input_gradients: RemovableHandle | None = None
        self.active: Block | None = None
        self.skip_layers: frozenset[int] = frozenset()
        self._plans: dict[tuple[Block | None, frozenset[int]], tuple[Setup, ...]] = {}
        self.active_plans: tuple[Setup, ...] = ()
        self._shared_rows = SharedRows(self.anatomy)
        self.activate(None)

    @property
    def base_model(self) -> Any:
        """The model whose sites these are."""
        return self.anatomy.base_model

    def follow(
        self,
        output: nn.Module | None,
        outside: tuple[Linear, ...] = (),
        of_heads: tuple[nn.Module, ...] | None = None,
    ) -> None:
        """The maps outside of the base model are these now; see ``Anatomy``."""
        self.anatomy = replace(self.anatomy, output=output, outside=outside, of_heads=of_heads)
        if LinearSite in self._read:
            known = {site.host for site in self.sites}
            for found in LinearSite.find_outside(self.anatomy):
                if found.host not in known:
                    self._enter(found)
            self._refresh()
        for site in self.sites:
            site.follow(output)

    def forget(self, *kinds: type[Site]) -> None:
        """Find the sites of these classes anew when they are next asked for; they must have no adapters."""
        self.sites = [site for site in self.sites if type(site) not in kinds]
        for index, site in enumerate(self.sites):
            site.index = index
        self._read -= set(kinds)
        self._refresh()

    def _enter(self, site: Site) -> None:
        site.index, site.owner = len(self.sites), self
        self.sites.append(site)

    def of(self, kind: type[T]) -> list[T]:
        """The sites of one class."""
        if kind not in self._read:
            found = list(kind.find(self.anatomy))  # nothing is read if that is refused
            self._read.add(kind)
            for site in found:
                self._enter(site)
            self._refresh()
        return [site for site in self.sites if type(site) is kind]

    def at_entrance(self, site: Any) -> RemovableHandle:
        """Let ``site.around(forward, model, …)`` run in place of the base model's forward, within its context."""
        handle = RemovableHandle(self.entrances)
        self.entrances[handle.id] = site
        return handle

    def __contains__(self, name: object) -> bool:
        """Whether an adapter of that name has modules here."""
        return name in self.shared_modules

    def holding(self, name: str) -> list[tuple[Site, AdapterModule[Any]]]:
        """The modules of an adapter, each with its site."""
        return [(site, site.adapters[name]) for site in self.sites if name in site.adapters]

    def shared(self, name: str) -> dict[str, nn.Module]:
        """What the modules of an adapter share, by its path relative to the base model."""
        return {f"{container}.{name}": module for container, module in self.shared_modules.get(name, {}).items()}

    def add(self, name: str, members: Iterable[AdapterConfig]) -> None:
        """Build an adapter's modules at every site that its configurations want; nothing stays if one fails.

        Raises:
            AdapterError: the model has no site that fits, or two members of a union want the same one.
        """
        self.shared_modules[name] = {}
        try:
            for config in members:
                place(self, name, config)
        except BaseException:
            self.remove(name)
            raise
        self._refresh()

    def add_part(self, name: str, members: Iterable[AdapterConfig], kind: type[Site]) -> bool:
        """Build the modules that an adapter's configurations want at sites of a class; False if none was missing."""
        if any(type(site) is kind for site, _ in self.holding(name)):
            return False
        methods = [(config, method) for config in members for method in methods_of(config) if method.site_type is kind]
        found = [place_method(self, name, config, method) for config, method in methods]
        self._refresh()
        return any(found)

    def remove_part(self, name: str, kind: type[Site]) -> None:
        """Remove an adapter's modules at sites of a class."""
        for site, _ in self.holding(name):
            if type(site) is kind:
                site.drop(name)
        self._refresh()

    def remove(self, name: str) -> None:
        """Remove all modules of an adapter; one that is merged is taken out of the weights first."""
        if self._merge is not None and name in self._merge.names:
            self.reset()
        for site, _ in self.holding(name):
            site.drop(name)
        for container in self.shared_modules.pop(name, {}):
            drop_shared(self.base_model, container, name)
        self._refresh()

    @property
    def merged(self) -> Setup:
        """The adapter, or the composition of some, that is worked into the weights."""
        return None if self._merge is None else self._merge.setup

    def merge(self, setup: Setup) -> None:
        """Work an adapter, or a Stack or Average of some, into the weights: all of it or nothing.

        Raises:
            AdapterError: another one is merged, or a module of it cannot be.
        """
        if self.merged == setup:
            return
        if self.merged is not None:
            raise AdapterError(
                f"merge_adapter({setup!r}): the model already has a merged adapter, {self.merged!r}. Please reset it "
                "first, with reset_adapter()."
            )
        block = Stack(setup)
        plans = self.plans(block, frozenset())
        modules = [
            *(module for name in block.leaves() for _, module in self.holding(name)),
            *(module for name in block.leaves() for module in self.shared(name).values()),
        ]
        acting = [(site, plan) for site, plan in zip(self.sites, plans, strict=True) if plan is not None]
        self._merge = Merge(setup, acting, modules)
        self._refresh()

    def reset(self, keep: bool = False) -> None:
        """Take the merged adapter out of the weights, bit for bit; keep: leave it there for good."""
        if self._merge is not None:
            self._merge.release() if keep else self._merge.undo()
            self._merge = None
            self._refresh()

    @contextmanager
    def merging(self, setup: Setup) -> Iterator[None]:
        """Within the block `setup` alone is in the weights, with None nothing is.

        Raises:
            AdapterError: it cannot be merged; nothing was changed then.
        """
        before = self.merged
        if before != setup:
            self.reset()
        try:
            if setup is not None:
                self.merge(setup)
            yield
        finally:
            if before != setup:
                self.reset()
                if before is not None:
                    self.merge(before)

    def add_fusion(self, fuse: Fuse, config: AdapterFusionConfig) -> None:
        """Build the fusion layers of `fuse` at every sub-layer where its adapters sit.

        Raises:
            CompositionError: its adapters sit at no common sub-layer.
        """
        places = self.fusion_places(fuse)
        dropout = getattr(self.base_model.config, "attention_probs_dropout_prob", 0.0) or 0.0
        for site in places:
            fusion = Fusion(config, site.width, dropout)
            like(site, fusion, keep_dtype=False)
            fusion.name, fusion.layer, fusion.location = fuse.name, site.layer, site.location
            site.put_fusion(fuse.name, fusion)

    def fusion_places(self, fuse: Fuse) -> list[SublayerSite]:
        """Where the layers of `fuse` go. An adapter of it that was deleted meanwhile does not count.

        Raises:
            CompositionError: its adapters sit at no common sub-layer, or also at other places.
        """
        leaves = fuse.flatten() & set(self.shared_modules)
        places = [site for site in self.of(SublayerSite) if leaves & set(site.adapters)]
        kinds = (SublayerSite, EmbeddingSite)
        beside = [site for site in self.sites if not isinstance(site, kinds) and leaves & set(site.adapters)]
        if places and beside:
            raise CompositionError(
                f"add_adapter_fusion({fuse.name!r}): at {beside[0].path or 'the embeddings'} sits another part of "
                f"{listing(sorted(leaves & set(beside[0].adapters)))}, where no update is there to be weighed; fuse "
                "adapters that are bottlenecks and nothing else, or use Average."
            )
        incomplete = [site for site in places if not leaves <= set(site.adapters)]
        if not places or incomplete:
            where = (
                f"at {incomplete[0].path} only {listing(sorted(leaves & set(incomplete[0].adapters)))} is there"
                if incomplete
                else ("none of them is a bottleneck adapter")
            )
            raise CompositionError(
                f"add_adapter_fusion({fuse.name!r}): the adapters do not sit at the same sub-layers, {where}; "
                "fuse bottleneck adapters that have the same mh_adapter, output_adapter, cross_adapter and leave_out."
            )
        return places

    def remove_fusion(self, name: str) -> None:
        """Remove the layers of a fusion."""
        for site in self.fusion_sites(name):
            site.drop_fusion(name)

    def fusion_sites(self, name: str) -> list[SublayerSite]:
        """The sub-layers where a fusion sits."""
        return [site for site in self.sites if isinstance(site, SublayerSite) and name in site.fusions]

    def fusion_layers(self) -> Iterator[Fusion]:
        """All fusion layers of the model."""
        for site in self.sites:
            if isinstance(site, SublayerSite):
                yield from (module for module in site.fusions.values() if isinstance(module, Fusion))

    def activate(self, setup: Block | None, skip_layers: Iterable[int] | None = None) -> None:
        """Make `setup` the composition that acts where no AdapterSetup says otherwise."""
        skip = frozenset(skip_layers or ())
        plans = self.plans(setup, skip)
        self.active, self.skip_layers, self.active_plans = setup, skip, plans

    def plans(self, setup: Block | None, skip_layers: frozenset[int]) -> tuple[Setup, ...]:
        """For every site, by its index, the part of `setup` that acts there.

        Raises:
            CompositionError: a Fuse has no fusion layers or stands where none can.
        """
        key = (setup, skip_layers)
        known = self._plans.get(key)
        if known is not None:
            return known
        plans = tuple(None if site.layer in skip_layers else site.resolve(setup) for site in self.sites)
        for site, plan in zip(self.sites, plans, strict=True):
            _check_fusions(site, plan)
        if torch.compiler.is_compiling():  # a graph can neither keep a block that it made nor hook modules
            return plans
        if len(self._plans) >= SETUPS:
            self._plans = {}
        self._plans[key] = plans
        if setup is not None and setup.parallel_channels > 1 and self._first_position(plans) > START:
            self._shared_rows.attach()
        return plans

    def shared_below(self, plans: tuple[Setup, ...]) -> Position:
        """What comes before this gives every channel of Parallel the same, and is computed once."""
        return self._first_position(plans) if self._shared_rows.attached else START

    def _first_position(self, plans: tuple[Setup, ...]) -> Position:
        """Where the first of the plans acts."""
        acting = (site for site, plan in zip(self.sites, plans, strict=True) if plan is not None)
        return min(map(self._shared_rows.position, acting), default=START)

    def _refresh(self) -> None:
        self._plans = {}
        self._shared_rows.detach()
        self.activate(self.active, self.skip_layers)

    def by_layer(self, name: str) -> dict[int, dict[str, nn.Module]]:
        """The modules of an adapter by layer and location, as ``get_adapter`` gives them."""
        found: dict[int, dict[str, list[nn.Module]]] = {}
        groups = dict(self.shared_modules.get(name, {}))
        prefixes = groups.pop(Prefix.shared_container, None)
        kinds: dict[str, nn.Module] = dict(prefixes.named_children()) if prefixes is not None else {}
        for site, module in self.holding(name):
            shown: nn.Module = module
            if isinstance(module, Prefix):
                first = {"prefix": kinds.pop(site.location)} if site.location in kinds else {}
                gate = {"gate": module} if module.weight is not None else {}
                shown = nn.ModuleDict({**first, **gate})
            found.setdefault(site.layer, {}).setdefault(site.location, []).append(shown)
        layers: dict[int, dict[str, nn.Module]] = {}
        if groups:
            layers[-1] = {"shared": next(iter(groups.values()))}
        for layer, locations in sorted(found.items()):
            layers.setdefault(layer, {}).update(
                (location, modules[0] if len(modules) == 1 else nn.ModuleList(modules))
                for location, modules in locations.items()
            )
        return layers

    def require_input_gradients(self, required: bool) -> None:
        """Let gradients through the first block's input, where transformers does not see to it: for inputs but tokens.

        Reentrant checkpointing gives gradients only to a block whose input asks for one.
        """
        if self._input_gradients is not None:
            self._input_gradients.remove()
            self._input_gradients = None
        if required and self.anatomy.blocks and self.base_model.main_input_name != "input_ids":
            self._input_gradients = self.anatomy.blocks[0].module.register_forward_pre_hook(_require_gradient)

    def effective(self) -> tuple[Block | None, tuple[Setup, ...]]:
        """The composition in force in this thread, an AdapterSetup before the active one, and its plans."""
        context = AdapterSetup.acting_on(self)
        if context is None:
            return self.active, self.active_plans
        setup: Block | None = context.adapter_setup
        missing = (setup.flatten() if setup else set()) - set(self.shared_modules)
        if missing:
            raise UnknownAdapterError(
                f"AdapterSetup({setup}): this model has no adapter named {listing(sorted(missing))}; "
                f"it has {listing(self.shared_modules)}. Add it with add_adapter or load_adapter."
            )
        return setup, self.plans(setup, self.skip_layers)

    def plan_outside_forward(self, site: Site) -> Setup:
        """What acts at `site` when a part of the model is called by itself."""
        return self.active_plans[site.index] if not state.setups else self.effective()[1][site.index]


def _require_gradient(module: nn.Module, args: tuple[Any, ...]) -> None:
    if args and not args[0].requires_grad and torch.is_grad_enabled():
        args[0].requires_grad_(True)


def _check_fusions(site: Site, plan: Setup) -> None:
    if not isinstance(plan, Block):
        return
    if isinstance(plan, Fuse) and not isinstance(site, EmbeddingSite):
        if not isinstance(site, SublayerSite):
            raise CompositionError(
                f"{plan}: AdapterFusion works on bottleneck adapters, but at {site.path} there is another method; "
                "use Average there."
            )
        if plan.name not in site.fusions:
            raise CompositionError(
                f"{plan}: this model has no fusion named {plan.name!r}; it has {listing(site.fusions)}. "
                f"Add it with add_adapter_fusion({plan.name.split(',')})."
            )
    for part in plan.children:
        _check_fusions(site, part)
