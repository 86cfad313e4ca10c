"""Sites: the places of a model where adapters can sit. Each turns a hook into a signal and back.

A site is tied to a host module and owns, by name, the adapters that sit there. Its parameters are registered inside the
model, next to what they act on, so that devices, dtypes, wrappers and state dicts carry them. Hooks exist only while
a site has adapters.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .composition import Block, Fuse, MultiTask, Setup, Stack
from .containers import child, child_dict, remove_child
from .context import current, state
from .errors import CompositionError, listing
from .evaluation import evaluate
from .signals import LinearSignal, Signal, SublayerSignal

if TYPE_CHECKING:
    from .method import AdapterModule

S = TypeVar("S", bound=Signal)


class SiteOwner(Protocol):
    """What a site asks of the map of sites that it belongs to."""

    def plan_outside_forward(self, site: Site) -> Setup:
        """What acts at `site` when the model's own forward is not running."""


@dataclass(frozen=True)
class Place:
    """Where a site is.

    layer: the block's number as 1.x counts (encoder, then decoder), -1 outside of all blocks;
    stack: "encoder", "decoder" or "" where there is one stack; layer_path, host_path: module paths relative to
    the base model; role: what the host does there; part: "q", "k" or "v" for a slice of a fused projection.
    """

    layer: int
    stack: str
    layer_path: str
    host_path: str
    role: str
    part: str = ""


class Site:
    """Owns the adapters of one place and sends its signal through the composition in force there."""

    kind: ClassVar[str]
    locations: ClassVar[dict[str, str]]

    def __init__(self, place: Place, host: nn.Module) -> None:
        """Note the place; nothing is registered or hooked before the first adapter."""
        self.place, self.host = place, host
        self.adapters: dict[str, AdapterModule[Any]] = {}
        self.index = -1
        self.owner: SiteOwner
        self._handles: list[RemovableHandle] = []

    layer = property(lambda self: self.place.layer)
    stack = property(lambda self: self.place.stack)
    layer_path = property(lambda self: self.place.layer_path)
    host_path = property(lambda self: self.place.host_path)
    role = property(lambda self: self.place.role)
    part = property(lambda self: self.place.part)

    @property
    def location(self) -> str:
        """The name that configurations and ``get_adapter`` have for this kind of place, such as ``output_adapter``."""
        return self.locations[self.place.role]

    @property
    def path(self) -> str:
        """Where the adapters' parameters are registered, relative to the base model."""
        raise NotImplementedError

    def mount(self) -> nn.Module:
        """The module at `path`, made if need be."""
        raise NotImplementedError

    def unmount(self) -> None:
        """Remove what ``mount`` made."""

    def attach(self) -> list[RemovableHandle]:
        """Hook the host."""
        raise NotImplementedError

    def detach(self) -> None:
        """Undo what ``attach`` did beyond its hooks."""

    @property
    def reference(self) -> Tensor:
        """A tensor whose device new parameters take, and whose dtype too where it is a floating one."""
        return next(self.host.parameters())

    def put(self, name: str, module: AdapterModule[Any]) -> None:
        """Take in an adapter."""
        module.name, module.layer, module.location = name, self.layer, self.location
        self._register(module.container, name, module)
        self.adapters[name] = module
        self._hook()

    def drop(self, name: str) -> None:
        """Remove an adapter, and with the last one the hooks and all that was registered."""
        module = self.adapters.pop(name)
        self._unregister(module.container, name)
        self._unhook()

    def _register(self, container: str, name: str, module: nn.Module) -> None:
        child_dict(self.mount(), container)[name] = module

    def _unregister(self, container: str, name: str) -> None:
        mount = self.mount()
        del child_dict(mount, container)[name]
        remove_child(mount, container)

    def _hook(self) -> None:
        if not self._handles:
            self._handles = self.attach()

    def _unhook(self) -> None:
        if self._idle:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self.detach()
            self.unmount()

    @property
    def _idle(self) -> bool:
        return not self.adapters

    def plan(self) -> Setup:
        """The part of the effective composition that acts here; None if nothing does."""
        forward = current()
        if forward is not None and forward.sites is self.owner:
            return forward.plans[self.index]
        return self.owner.plan_outside_forward(self)

    def resolve(self, setup: Setup) -> Setup:
        """`setup` with None for every name that has no module here; None if nothing is left."""
        if isinstance(setup, Block):
            children = [self.resolve(child) for child in setup.children]
            if all(child is None for child in children):
                return None
            if isinstance(setup, Stack):
                children = [child for child in children if child is not None]
                if len(children) == 1:
                    return children[0]
            return setup.with_children(children)
        return setup if setup in self.adapters else None

    def apply(self, name: str, signal: S) -> S:
        """One adapter; the identity if it has no module here."""
        module = self.adapters.get(name)
        if module is None:
            return signal
        output: S = module(signal)
        return output

    def fuse(self, tree: Fuse, signal: S) -> S:
        """AdapterFusion of the children."""
        raise CompositionError(
            f"{tree}: AdapterFusion works on bottleneck adapters, {self.host_path} has {listing(self.adapters)}; "
            "use Average for other methods."
        )

    def task_ids(self, tree: MultiTask) -> Tensor:
        """(b,) the child of `tree` that each row goes to."""
        forward = current()
        if forward is None or forward.task_ids is None:
            raise CompositionError(
                f"{tree}: the forward call has no task_ids; pass task_ids=, one child of the block for each row."
            )
        return forward.task_ids

    @property
    def rows_are_repeated(self) -> bool:
        """Whether the batch of the pass in progress has a copy for every channel of Parallel."""
        forward = current()
        return forward is not None and forward.sites is self.owner and forward.repeated

    @property
    def rows_are_expanded(self) -> bool:
        """Whether ``generate`` is running, which repeats each row for beams and return sequences."""
        return state.generating is self.owner


class LinearSite(Site):
    """A linear map W (out, in), or a slice of the outputs of a fused one."""

    kind = "linear"
    locations: ClassVar[dict[str, str]] = dict.fromkeys("qkvo", "selfattn_lora") | {
        "intermediate": "intermediate_lora",
        "output": "output_lora",
    }

    def __init__(
        self, place: Place, host: nn.Module, inputs: int, outputs: int, start: int = 0, source: str | None = None
    ) -> None:
        """inputs, outputs: the map's widths; start: its first output in a fused one; source: the stack of its input."""
        super().__init__(place, host)
        self.inputs, self.outputs, self.start = inputs, outputs, start
        self.source = place.stack if source is None else source

    @property
    def path(self) -> str:
        """The host's own path; with the part below it for a slice."""
        return f"{self.host_path}.{self.part}" if self.part else self.host_path

    def mount(self) -> nn.Module:
        """The host itself, or a container in it for a slice."""
        return child(self.host, self.part) if self.part else self.host

    def unmount(self) -> None:
        """Remove the container of a slice."""
        if self.part:
            remove_child(self.host, self.part)

    def attach(self) -> list[RemovableHandle]:
        """Hook the output of the map."""
        return [self.host.register_forward_hook(self.on_output, prepend=True)]

    def on_output(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Wx becomes what the adapters make of it."""
        plan = self.plan()
        if plan is None:
            return None
        owned = isinstance(plan, str) and not torch.is_grad_enabled()
        if not self.part:
            return evaluate(plan, LinearSignal(None, args[0], output, owned), self).output
        stop = self.start + self.outputs
        own = output[..., self.start : stop]
        part = evaluate(plan, LinearSignal(None, args[0], own, owned), self).output
        return output if part is own else torch.slice_scatter(output, part, -1, self.start, stop)


class Kept(threading.local):
    """What one hook of a sub-layer keeps for the next, per thread; copies and pickles start empty."""

    def __init__(self) -> None:
        self.residual: Tensor | None = None
        self.final: Tensor | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


@dataclass(frozen=True)
class Sublayer:
    """A sub-layer in terms of modules.

    entry: its first module that is given the residual stream r, as argument `argument`; exit: the module whose output
    (item `item` of it, if it is a tuple) is added to r; norm: the norm of that sum, None in a pre-norm model.
    """

    entry: nn.Module
    argument: int | str
    exit: nn.Module
    item: int | None
    norm: nn.Module | None


class SublayerSite(Site):
    """The output h of a sub-layer, before the model adds it to the residual stream r."""

    kind = "sublayer"
    locations: ClassVar[dict[str, str]] = {
        "self_attention": "mh_adapter",
        "cross_attention": "cross_adapter",
        "feed_forward": "output_adapter",
    }
    names: ClassVar[dict[str, str]] = {
        "self_attention": "attention_adapters",
        "cross_attention": "cross_attention_adapters",
        "feed_forward": "output_adapters",
    }

    def __init__(self, place: Place, block: nn.Module, sublayer: Sublayer, width: int) -> None:
        """width: d of the hidden states (b, s, d)."""
        super().__init__(place, block)
        self.sublayer, self.width = sublayer, width
        self.fusions: dict[str, nn.Module] = {}
        self._kept = Kept()

    @property
    def path(self) -> str:
        """In the block, named for the sub-layer."""
        return f"{self.layer_path}.{self.names[self.role]}"

    def mount(self) -> nn.Module:
        """A container in the block."""
        return child(self.host, self.names[self.role])

    def unmount(self) -> None:
        """Remove the container."""
        remove_child(self.host, self.names[self.role])

    def attach(self) -> list[RemovableHandle]:
        """Hook the sub-layer's entry, exit and norm."""
        sublayer = self.sublayer
        handles = [
            sublayer.entry.register_forward_pre_hook(self.on_entry, prepend=True, with_kwargs=True),
            sublayer.exit.register_forward_hook(self.on_exit, prepend=True),
        ]
        if sublayer.norm is not None:
            handles.append(sublayer.norm.register_forward_hook(self.on_norm, prepend=True))
        return handles

    def on_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the residual stream."""
        if self.plan() is not None:
            argument = self.sublayer.argument
            self._kept.residual = args[argument] if isinstance(argument, int) else kwargs[argument]

    def on_exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """h becomes what the adapters make of it; the model goes on to add r and to normalise."""
        plan, residual = self.plan(), self._kept.residual
        if plan is None or residual is None:
            return None
        self._kept.residual = None
        item = self.sublayer.item
        hidden = output if item is None else output[item]
        signal = evaluate(plan, SublayerSignal(None, hidden, residual), self)
        hidden = signal.hidden
        if signal.final is not None:
            hidden = torch.where(signal.final, hidden - residual, hidden)
            self._kept.final = signal.final
        return hidden if item is None else (*output[:item], hidden, *output[item + 1 :])

    def on_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Where the adapter's output is final the norm is passed by."""
        final = self._kept.final
        if final is None:
            return None
        self._kept.final = None
        return torch.where(final, args[0], output)

    def normalised(self, hidden: Tensor) -> Tensor:
        """The model's norm of the sub-layer's sum, where it has one there."""
        norm = self.sublayer.norm
        if norm is None:
            return hidden
        output: Tensor = norm.forward(hidden)  # past the hooks: this is not the model's own call
        return output

    def put_fusion(self, name: str, module: nn.Module) -> None:
        """Take in a fusion layer."""
        self._register("adapter_fusion_layer", name, module)
        self.fusions[name] = module
        self._hook()

    def drop_fusion(self, name: str) -> None:
        """Remove a fusion layer."""
        del self.fusions[name]
        self._unregister("adapter_fusion_layer", name)
        self._unhook()

    @property
    def _idle(self) -> bool:
        return not (self.adapters or self.fusions)

    def fuse(self, tree: Fuse, signal: S) -> S:
        """AdapterFusion: the last child prepares the query and the residual, all children give the values."""
        last = self.adapters[tree.last()]
        outputs = [evaluate(child, signal, self) for child in tree.children if child is not None]
        fused: S = self.fusions[tree.name](signal, outputs, last)
        return fused
