"""The site of bottleneck adapters and AdapterFusion: what a sub-layer gives, before the residual is added."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .composition import Fuse
from .context import Kept
from .errors import AdapterError
from .evaluation import evaluate
from .interface import AdapterModelInterface
from .recorded import recorded_sublayers
from .signals import Signal, SublayerSignal
from .sites import Place, Site
from .topology import Anatomy, Block
from .trace import Sublayer

S = TypeVar("S", bound=Signal)


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
        self.sublayer, self.width, self.holder = sublayer, width, self.names[place.role]
        self.fusions: dict[str, nn.Module] = {}
        self._kept = Kept()

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """The sub-layers that a traced pass finds; where none could be traced, those that the user describes."""
        interface = anatomy.interface
        try:
            found = recorded_sublayers(anatomy.base_model, anatomy.blocks)
        except AdapterError:
            if interface is None:
                raise
            found = {block.path: _described(block, interface) for block in anatomy.blocks}
        for block in anatomy.blocks:
            for role, sublayer in found.get(block.path, {}).items():
                place = Place(block.layer, block.stack, block.path, block.path, role)
                yield cls(place, block.module, sublayer, sublayer.width)

    def attach(self) -> list[RemovableHandle]:
        """Hook the sub-layer's entry, exit and norm."""
        sublayer = self.sublayer
        handles = [
            sublayer.entry.register_forward_pre_hook(self.on_entry, prepend=True, with_kwargs=True),
            sublayer.exit.register_forward_hook(self.on_exit),  # after those of a linear map that is the exit
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
        given = output if item is None else output[item]
        hidden, residual = self._in_order(given, residual)
        signal = evaluate(plan, SublayerSignal(None, hidden, residual), self)
        hidden = signal.hidden
        if signal.final is not None:
            hidden = torch.where(signal.final, hidden - residual, hidden)
            self._kept.final = self._moved_back(signal.final)
        hidden = self._moved_back(hidden).reshape(given.shape)
        return hidden if item is None else (*output[:item], hidden, *output[item + 1 :])

    def _in_order(self, given: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the exit gives, and the residual stream, with the batch in front and the width at the end."""
        rows, channels = self.sublayer.rows, self.sublayer.channels
        if rows < 0:  # rows and positions are one
            return given.reshape(residual.shape), residual
        residual = residual.reshape(given.shape)
        if rows or channels != -1:
            given, residual = (part.movedim((rows, channels), (0, -1)) for part in (given, residual))
        return given, residual

    def _moved_back(self, values: Tensor) -> Tensor:
        """Values (b, …, n) with the dimensions where the model has them."""
        rows, channels = self.sublayer.rows, self.sublayer.channels
        return values.movedim((0, -1), (rows, channels)) if rows > 0 or (rows == 0 and channels != -1) else values

    def on_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Where the adapter's output is final the norm is passed by."""
        final = self._kept.final
        if final is None:
            return None
        self._kept.final = None
        return torch.where(final, args[0], output)

    def normalised(self, hidden: Tensor) -> Tensor:
        """The model's norm of the sub-layer's sum, where it has one there; as it is without adapters of its own."""
        norm = self.sublayer.norm
        if norm is None:
            return hidden
        # Past the hooks, since this is not the model's own call, and past the norm's adapters, since a setup is about
        # all rows and positions, which this need not have.
        replaced = vars(norm).get("forward")
        if isinstance(replaced, MethodType) and isinstance(replaced.__self__, Site):
            output: Tensor = type(norm).forward(norm, hidden)
            return output
        output = norm.forward(hidden)
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
        fusion: Any = self.fusions[tree.name]
        fused: S
        modules = [self.adapters.get(child) if isinstance(child, str) else None for child in tree.children]
        if fusion.joins(modules, signal):
            fused = fusion.joint(signal, modules)
            return fused
        outputs = [evaluate(child, signal, self) for child in tree.children if child is not None]
        fused = fusion(signal, outputs, self.adapters[tree.last()])
        return fused


def _described(block: Block, interface: AdapterModelInterface) -> dict[str, Sublayer]:
    """The sub-layers of a block that no pass could be traced through."""
    attention, across, out = interface.layer_self_attn, interface.layer_cross_attn, interface.attn_o_proj
    norms = interface.layer_ln_1, interface.layer_ln_2
    maps = interface.layer_intermediate_proj, interface.layer_output_proj
    rows: dict[str, tuple[str | None, str, str, str | None]] = {
        "self_attention": (interface.layer_pre_self_attn, attention, f"{attention}.{out}".removeprefix("."), norms[0]),
        "cross_attention": (
            interface.layer_pre_cross_attn,
            across or "",
            f"{across}.{out}".removeprefix("."),
            norms[0],
        ),
        "feed_forward": (interface.layer_pre_ffn, *maps, norms[1]),
    }
    found = {}
    for role, (before, first, last, after) in rows.items():
        if first:
            entry, exit = (block.module.get_submodule(path) for path in (before or first, last))
            norm = block.module.get_submodule(after) if after and before is None else None
            found[role] = Sublayer(entry, 0, exit, None, norm, block.width, 0, -1)
    return found
