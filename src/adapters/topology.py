"""Reads where adapters can sit off the module tree of any transformers model: by structure first, names second.

A *block* is a child of a ModuleList whose siblings are of its class and which holds an attention; an attention's *core*
is the module whose direct children are the query, key and value projections, or one projection of all three.
Where sub-layers begin and end is a matter of dataflow: see ``trace.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .containers import AdapterDict
from .interfaces import SWAPPED_FEED_FORWARD

SEPARATE = {
    "q": {"q_proj", "query", "q", "q_lin", "linear_q", "query_proj"},
    "k": {"k_proj", "key", "k", "k_lin", "linear_k", "key_proj"},
    "v": {"v_proj", "value", "v", "v_lin", "linear_v", "value_proj"},
}
FUSED = "c_attn"
QUERY_BESIDE_FUSED = "q_attn"
OUTPUTS = {"o_proj", "out_proj", "dense", "o", "out_lin", "c_proj", "proj", "linear_out", "wo", "Wo", "to_out"}
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True)
class Linear:
    """A linear map, or the slice [start, start + outputs) of the outputs of a fused one."""

    path: str
    module: nn.Module
    inputs: int
    outputs: int
    start: int = 0
    part: str = ""


@dataclass(frozen=True)
class Core:
    """An attention's core. projections: by "q", "k", "v" and, where it was found, "o"."""

    path: str
    module: nn.Module
    role: str
    projections: dict[str, Linear]
    head_width: int

    @property
    def key_heads(self) -> int:
        """The number of key and value heads."""
        return self.projections["k"].outputs // self.head_width


@dataclass(frozen=True)
class Block:
    """A repeated layer of the model. feed_forward: its "intermediate" and "output" projections."""

    path: str
    module: nn.Module
    layer: int
    stack: str
    cores: tuple[Core, ...]
    feed_forward: dict[str, Linear]


@dataclass(frozen=True)
class Anatomy:
    """What was read of a model.

    output: the map from hidden states to words, if the model has one of its own; outside: the linear maps of the whole
    model that are not in its base model, such as a classifier, with their paths in the whole.
    """

    base_model: Any
    blocks: list[Block]
    output: nn.Module | None = None
    outside: tuple[Linear, ...] = ()

    @property
    def crosses(self) -> bool:
        """Whether any block attends to another stack."""
        return any(core.role == "cross_attention" for block in self.blocks for core in block.cores)


def read_blocks(base_model: nn.Module) -> list[Block]:
    """The blocks of a model in module order, numbered as 1.x numbers layers."""
    model_type = getattr(base_model.config, "model_type", "")
    encoder_decoder = bool(getattr(base_model.config, "is_encoder_decoder", False))
    blocks = []
    for layer, (path, module) in enumerate(_repeated(base_model)):
        linears = _linears(module, path)
        cores = tuple(_cores(module, path, base_model.config, linears))
        attention = {linear.path for core in cores for linear in core.projections.values()}
        rest = [linear for linear in linears if linear.path not in attention]
        stack = "" if not encoder_decoder else "decoder" if "decoder" in path.split(".") else "encoder"
        feed_forward = _feed_forward(rest, cores, model_type in SWAPPED_FEED_FORWARD)
        blocks.append(Block(path, module, layer, stack, cores, feed_forward))
    return blocks


def input_embeddings(model: Any) -> nn.Module | None:
    """What makes embeddings of the model's input; None if transformers does not know."""
    try:
        found: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def path_of(model: nn.Module, module: nn.Module) -> str | None:
    """The path of a module in a model; None if it is no part of it."""
    return next((path for path, part in model.named_modules() if part is module), None)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, of whichever class; None for any other module."""
    if not _takes_one_tensor(type(module).forward):
        return None
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        if isinstance(getattr(module, inputs, None), int) and isinstance(getattr(module, outputs, None), int):
            return getattr(module, inputs), getattr(module, outputs)
    return None


@functools.cache
def _takes_one_tensor(forward: Callable[..., Any]) -> bool:
    """I-BERT's maps take a scaling factor too, and return one."""
    _, *taken = inspect.signature(forward).parameters.values()
    named = [parameter for parameter in taken if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return len(named) <= 1


def linear_roles(anatomy: Anatomy) -> Iterator[tuple[Block | None, Linear, str, str]]:
    """Every linear map of the base model: its block, the map or a slice of it, its role, and the stack of its input.

    First the projections of every attention and the two maps of every feed-forward block; then, with the role "other",
    all that are left. A fused projection is among these as a whole.
    """
    taken = {anatomy.output}
    for block in anatomy.blocks:
        for core in block.cores:
            for role, found in core.projections.items():
                across = core.role == "cross_attention" and role in ("k", "v")
                yield block, found, role, "encoder" if across else block.stack
                taken |= set() if found.part else {found.module}
        for role, found in block.feed_forward.items():
            yield block, found, role, block.stack
            taken.add(found.module)
    for found in linear_maps(anatomy.base_model):
        if found.module not in taken:
            own = next((block for block in anatomy.blocks if found.path.startswith(f"{block.path}.")), None)
            yield own, found, "other", "" if own is None else own.stack


def outside_maps(model: Any) -> tuple[Linear, ...]:
    """The linear maps of a model that are not in its base model."""
    base = set(model.base_model.modules())
    return tuple(found for found in linear_maps(model) if found.module not in base)


def linear_maps(model: nn.Module, path: str = "") -> Iterator[Linear]:
    """Every linear map of a model but those of adapters, and those that nobody calls (torch's own attention)."""
    for name, module in model.named_children():
        below = f"{path}.{name}" if path else name
        shape = None if isinstance(module, NonDynamicallyQuantizableLinear) else linear_shape(module)
        if shape is not None:
            yield Linear(below, module, *shape)
        if not isinstance(module, AdapterDict):
            yield from linear_maps(module, below)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as (outputs, inputs); GPT-2's keeps it the other way round."""
    return hasattr(module, "in_features")


def _repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    fitting = {
        path: module
        for path, module in lists.items()
        if len({type(child) for child in module}) == 1 and all(_has_core(child) for child in module)
    }
    for path, module in fitting.items():
        if not any(other.startswith(f"{path}.") for other in fitting):
            found += [(f"{path}.{name}", child) for name, child in module.named_children()]
    return found


def _has_core(module: nn.Module) -> bool:
    return any(_core_parts(child) for child in module.modules())


def _core_parts(module: nn.Module) -> dict[str, str]:
    """The names of the children that project to q, k and v; one name for all three if they are fused."""
    names = [name for name, child in module.named_children() if linear_shape(child)]
    parts = {part: name for part, known in SEPARATE.items() for name in names if name in known}
    if len(parts) == len(SEPARATE):
        return parts
    if FUSED not in names:
        return {}
    if QUERY_BESIDE_FUSED in names:
        return {"q": QUERY_BESIDE_FUSED, "k": FUSED, "v": FUSED}
    inputs, outputs = linear_shape(module.get_submodule(FUSED)) or (0, 0)
    return dict.fromkeys(SEPARATE, FUSED) if outputs == 3 * inputs else {}


def _linears(block: nn.Module, path: str) -> list[Linear]:
    shapes = ((name, child, linear_shape(child)) for name, child in block.named_modules())
    return [Linear(f"{path}.{name}", child, *shape) for name, child, shape in shapes if shape]


def _cores(block: nn.Module, path: str, config: object, linears: list[Linear]) -> Iterator[Core]:
    by_path = {linear.path: linear for linear in linears}
    order = list(by_path)
    roles = iter(("self_attention", "cross_attention"))
    for name, module in block.named_modules():
        parts = _core_parts(module)
        if not parts:
            continue
        core_path = f"{path}.{name}" if name else path
        projections = {part: by_path[f"{core_path}.{child}"] for part, child in parts.items()}
        fused = [part for part, child in parts.items() if child == FUSED]
        for position, part in enumerate(fused):
            projections[part] = _slice(projections[part], part, position, len(fused))
        last = max(order.index(linear.path) for linear in projections.values())
        width = projections["q"].inputs
        after = [by_path[other] for other in order[last + 1 :]]
        output = next((linear for linear in after if _gives_output(linear, width, projections["q"].outputs)), None)
        if output is not None:
            projections["o"] = output
        yield Core(
            core_path, module, next(roles, "cross_attention"), projections, _head_width(module, config, projections)
        )


def _slice(fused: Linear, part: str, position: int, parts: int) -> Linear:
    width = fused.outputs // parts
    return Linear(fused.path, fused.module, fused.inputs, width, position * width, part)


def _gives_output(linear: Linear, width: int, heads: int) -> bool:
    return linear.path.rsplit(".", 1)[-1] in OUTPUTS and (linear.inputs, linear.outputs) == (heads, width)


def _head_width(module: nn.Module, config: object, projections: dict[str, Linear]) -> int:
    for name in HEAD_WIDTHS:
        if isinstance(width := getattr(module, name, None), int):
            return width
    heads = getattr(config, "num_attention_heads", 1)
    return projections["q"].outputs // int(heads)


def _feed_forward(rest: list[Linear], cores: tuple[Core, ...], swapped: bool) -> dict[str, Linear]:
    """The pair of maps from the width to an inner one and back; of several pairs the one with the widest inside."""
    width = cores[0].projections["q"].inputs if cores else 0
    pairs = [
        (first, second)
        for first, second in pairwise(rest)
        if first.inputs == second.outputs == width and second.inputs in (first.outputs, first.outputs // 2)
    ]
    widest = max((second.inputs for _, second in pairs), default=0)
    found = [pair for pair in pairs if pair[1].inputs == widest]
    if len(found) != 1:
        return {}
    names = ("output", "intermediate") if swapped else ("intermediate", "output")
    return dict(zip(names, found[0], strict=True))
