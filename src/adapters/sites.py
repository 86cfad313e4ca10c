"""Sites: the places of a model where adapters can sit. Each turns a hook into a signal and back.

A site is tied to a host module and owns, by name, the adapters that sit there. Its parameters are registered inside the
model, next to what they act on, so that devices, dtypes, wrappers and state dicts carry them. Hooks exist only while
a site has adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from .composition import Block, Fuse, MultiTask, Route, Rows, Setup, Stack
from .containers import child, child_dict, remove_child
from .context import current, state
from .convolutions import convolution_shape, image, matrix_of, patches, pixels
from .errors import CompositionError, listing
from .evaluation import evaluate
from .grouping import Group, Groups
from .quantised import dequantised, is_quantised
from .signals import LinearSignal, Signal
from .standing_in import StandIn
from .topology import Anatomy, Linear, linear_roles

if TYPE_CHECKING:
    from .method import AdapterModule

S = TypeVar("S", bound=Signal)


class SiteOwner(Protocol):
    """What a site asks of the map of sites that it belongs to."""

    anatomy: Anatomy

    def plan_outside_forward(self, site: Site) -> Setup:
        """What acts at `site` when the model's own forward is not running."""

    def at_entrance(self, site: Any) -> RemovableHandle:
        """Let ``site.around(forward, model, …)`` run in place of the base model's forward, within its context."""


@dataclass(frozen=True)
class Place:
    """Where a site is.

    layer: the block's number as 1.x counts (encoder, then decoder), -1 outside of all blocks;
    stack: "encoder", "decoder" or "" where there is one stack; layer_path, host_path: module paths relative to
    the base model; role: what the host does there; part: "q", "k" or "v" for a slice of a fused projection;
    outside: the host's path in the whole model, if it is, or may be, outside of the base model.
    """

    layer: int
    stack: str
    layer_path: str
    host_path: str
    role: str
    part: str = ""
    outside: str = ""


class Site:
    """Owns the adapters of one place and sends its signal through the composition in force there.

    holder: the name of a container in ``root`` that is made for the adapters' parameters; "" if they need none.
    """

    kind: ClassVar[str]
    locations: ClassVar[dict[str, str]]
    holder: str = ""

    def __init__(self, place: Place, host: nn.Module) -> None:
        """Note the place; nothing is registered or hooked before the first adapter."""
        self.place, self.host, self.source = place, host, place.stack
        self.adapters: dict[str, AdapterModule[Any]] = {}
        self._groups = Groups()
        self.merged: frozenset[str] = frozenset()
        self.index = -1
        self.owner: SiteOwner
        self._handles: list[RemovableHandle] = []

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """All sites of this class in a model, in the order of its layers."""
        raise NotImplementedError

    layer = property(lambda self: self.place.layer)
    stack = property(lambda self: self.place.stack)
    layer_path = property(lambda self: self.place.layer_path)
    host_path = property(lambda self: self.place.host_path)
    role = property(lambda self: self.place.role)
    part = property(lambda self: self.place.part)
    module_path = property(lambda self: self.place.outside or self.place.host_path)

    @property
    def location(self) -> str:
        """The name that configurations and ``get_adapter`` have for this kind of place, such as ``output_adapter``."""
        return self.locations[self.place.role]

    @property
    def root(self) -> tuple[str, nn.Module]:
        """The module in which the adapters' parameters are registered, with its path relative to the base model."""
        return self.host_path, self.host

    @property
    def path(self) -> str:
        """Where the adapters' parameters are registered, relative to the base model."""
        return ".".join(filter(None, (self.root[0], self.holder)))

    def mount(self) -> nn.Module:
        """The module at `path`, made if need be."""
        root = self.root[1]
        return child(root, self.holder) if self.holder else root

    def unmount(self) -> None:
        """Remove what ``mount`` made."""
        if self.holder:
            remove_child(self.root[1], self.holder)

    def attach(self) -> list[RemovableHandle]:
        """Hook the host."""
        raise NotImplementedError

    def detach(self) -> None:
        """Undo what ``attach`` did beyond its hooks."""

    def follow(self, output: nn.Module | None) -> None:
        """The map from hidden states to words is `output` now."""

    @property
    def weight(self) -> Tensor | None:
        """The parameter that adapters here can be merged into, or a view of it; None if there is none."""
        return None

    @property
    def bias(self) -> Tensor | None:
        """The same for a bias; None if there is none."""
        return None

    def write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Make these the weight and the bias."""
        for own, value in ((self.weight, weight), (self.bias, bias)):
            if own is not None and value is not None:
                own.copy_(value)

    def is_current(self, base_model: Any) -> bool:
        """Whether the host is still where it was found."""
        module = base_model
        for part in filter(None, self.host_path.split(".")):
            module = module._modules.get(part) if module is not None else None
        return module is self.host

    @property
    def reference(self) -> Tensor:
        """A tensor whose device new parameters take, and whose dtype too where it is a floating one."""
        weight: Tensor | None = self.host._parameters.get("weight")
        return next(chain(self.host.parameters(), self.host.buffers())) if weight is None else weight

    def put(self, name: str, module: AdapterModule[Any]) -> None:
        """Take in an adapter."""
        known = {"name": name, "layer": self.layer, "location": self.location, "order": self.index}
        vars(module).update(known)  # nn.Module's own way is slow
        self._register(module.container, name, module)
        self.adapters[name] = module
        self._groups = Groups()
        self._hook()

    def drop(self, name: str) -> None:
        """Remove an adapter, and with the last one the hooks and all that was registered."""
        module = self.adapters.pop(name)
        self._groups = Groups()
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
        """`setup` with None for every name that has no module here, or one in the weights; None if nothing is left."""
        if isinstance(setup, Route) and not setup.flatten().isdisjoint(self.adapters):
            self._check_route(setup)
        if isinstance(setup, Block):
            children = [self.resolve(child) for child in setup.children]
            if all(child is None for child in children):
                return None
            if isinstance(setup, Route):  # an expert without a module here keeps its weight: it changes nothing
                return setup.with_children(
                    [found or child for found, child in zip(children, setup.children, strict=True)]
                )
            if isinstance(setup, Stack):
                children = [child for child in children if child is not None]
                if len(children) == 1:
                    return children[0]
            return setup.with_children(children)
        return setup if setup in self.adapters and setup not in self.merged else None

    def _check_route(self, tree: Route) -> None:
        if tree.gate not in self.adapters:
            raise CompositionError(
                f"{tree}: the gate {tree.gate!r} has no module at {self.path}, where one of its experts sits; add a "
                "gate when all its experts are there, with RouterConfig(experts=[…])."
            )
        self.adapters[tree.gate].check_experts(tree.experts())

    def apply(self, name: str, signal: S) -> S:
        """One adapter; the identity if it has no module here."""
        module = self.adapters.get(name)
        if module is None:
            return signal
        output: S = module(signal)
        return output

    def group(self, tree: Block) -> Group | None:
        """The modules of the children of `tree`, if they can be computed in one call."""
        return self._groups.of(tree, self.adapters)

    def fuse(self, tree: Fuse, signal: S) -> S:
        """AdapterFusion of the children."""
        raise CompositionError(
            f"{tree}: AdapterFusion works on bottleneck adapters, {self.host_path} has {listing(self.adapters)}; "
            "use Average for other methods."
        )

    def task_ids(self, tree: MultiTask) -> Tensor:
        """(b,) the child of `tree` that each row goes to."""
        forward = current()
        if isinstance(tree, Rows) and forward is not None and forward.assignment is not None:
            return forward.assignment
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
        "other": "target_modules",
    }

    def __init__(self, place: Place, found: Linear, source: str | None = None) -> None:
        """source: the stack of the map's input, if it is another than the map's own."""
        super().__init__(place, found.module)
        self.inputs, self.outputs, self.start = found.inputs, found.outputs, found.start
        self.rows, self.convolves = found.rows, convolution_shape(found.module) is not None
        self.holder = place.part or place.outside.replace(".", "_")
        self.source = self.source if source is None else source
        self._stand_in = StandIn(self)

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """The projections of every attention and the two maps of every feed-forward block; then all other maps."""
        for block, found, role, source in linear_roles(anatomy):
            where = (-1, "", "") if block is None else (block.layer, block.stack, block.path)
            yield cls(Place(*where, found.path, role, found.part), found, source)
        yield from cls.find_outside(anatomy)

    @classmethod
    def find_outside(cls, anatomy: Anatomy) -> Iterator[Self]:
        """The maps outside of the base model; their adapters are registered there all the same."""
        for found in anatomy.outside:
            if found.module is not anatomy.output:
                yield cls(Place(-1, "", "", "", "other", outside=found.path), found)

    @property
    def root(self) -> tuple[str, nn.Module]:
        """The host; for a map outside of the base model, the base model."""
        return ("", self.owner.anatomy.base_model) if self.place.outside else super().root

    def is_current(self, base_model: Any) -> bool:
        """As for any site; outside of the base model, whether the whole model has the host still."""
        if not self.place.outside:
            return super().is_current(base_model)
        return any(found.module is self.host for found in self.owner.anatomy.outside)

    @property
    def weight(self) -> Tensor:
        """W (out, in): a view of the host's parameter; a copy of a quantised one, and of outputs that alternate."""
        if is_quantised(self.host):
            return dequantised(self.host)[self.rows]
        return matrix_of(self.host)[self.rows]

    @property
    def stored(self) -> Tensor:
        """What W is read from: it changes when W does, so what is computed of W holds until then."""
        return self.reference

    @property
    def bias(self) -> Tensor | None:
        """(out,) a view of the host's bias."""
        bias: Any = self.host.bias
        return None if bias is None else bias[self.rows]

    def write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Make these W and the bias."""
        host: Any = self.host
        for own, value in ((matrix_of(host), weight), (host.bias, bias)):
            if value is not None:
                own[self.rows] = value.to(own.dtype)

    def map(self, x: Tensor) -> Tensor:
        """W x, without bias, for any x (…, in)."""
        return linear(x, self.weight.to(x.dtype))

    def attach(self) -> list[RemovableHandle]:
        """Hook the output of the map."""
        return [self.host.register_forward_hook(self.on_output, prepend=True)]

    def put(self, name: str, module: AdapterModule[Any]) -> None:
        """Take in an adapter; the first that has an input or a weight of its own for the map needs more than a hook."""
        super().put(name, module)
        if not self.part and not self.place.outside:
            self._stand_in.attach(module.changes_weight)
        if module.transforms_input and not (self.part or self.convolves) and len(self._handles) == 1:
            self._handles.append(self.host.register_forward_pre_hook(self.on_input))

    def detach(self) -> None:
        """Give the host its forward back."""
        self._stand_in.detach()

    def on_input(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The map is given what the adapter makes of x, where one acts alone: Wx itself is then not needed."""
        plan = self.plan()
        if not isinstance(plan, str) or not self.adapters[plan].transforms_input:
            return None
        return self.adapters[plan].transform_input(args[0]), *args[1:]

    def signal(self, plan: Setup, host: nn.Module, x: Tensor, output: Tensor) -> LinearSignal:
        """What is sent through `plan`."""
        alone = isinstance(plan, str)
        owned = alone and not (torch.is_grad_enabled() or host.training)
        transformed = alone and not (self.part or self.convolves) and self.adapters[str(plan)].transforms_input
        return LinearSignal(None, x, output, owned, transformed)

    def on_output(self, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Wx becomes what the adapters make of it."""
        plan = self.plan()
        if plan is None or self._stand_in.acts(plan, args[0]):
            return None
        if self.convolves:
            signal = self.signal(plan, host, patches(host, args[0]), pixels(output))
            return image(evaluate(plan, signal, self).output, output)
        if not self.part:
            return evaluate(plan, self.signal(plan, host, args[0], output), self).output
        own = output[..., self.rows]
        part = evaluate(plan, self.signal(plan, host, args[0], own), self).output
        if isinstance(self.rows, Tensor):
            return output.index_copy(-1, self.rows.to(output.device), part)
        return output if part is own else torch.slice_scatter(output, part, -1, self.rows.start, self.rows.stop)
