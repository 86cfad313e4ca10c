"""Reads where adapters can sit off the module tree of any transformers model: by structure first, names second.

A *block* is a child of a ModuleList whose siblings are of its class and which holds an attention; an attention's *core*
is the module whose direct children are the query, key and value projections, or one projection of all three.
Where sub-layers begin and end is a matter of dataflow: see ``trace.py``.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from .containers import AdapterDict
from .convolutions import channels_of, convolution_shape, convolves
from .interface import AdapterModelInterface
from .interfaces import SWAPPED_FEED_FORWARD

_AROUND = r"(w|to_?|linear_|in_proj_|projection_)?(%s)(_b)?(_proj|_lin|_linear|_layer|_head|_projection|s)?"
NAMES: dict[tuple[str, ...], re.Pattern[str]] = {
    parts: re.compile(_AROUND % names, re.IGNORECASE)
    for parts, names in {
        ("q",): "q|query|q_attn",
        ("k",): "k|key",
        ("v",): "v|value",
        ("k", "v"): "kv|key_value",
        ("q", "k", "v"): "qkv|query_key_value|c_attn|att_proj|in_proj|queries_keys_value",
    }.items()
}
"""What projections are called, by the parts that they give; the case does not matter."""
CROSSES = re.compile(r"cross|enc_?dec|encoder_attn|encoder_decoder", re.IGNORECASE)
OUTPUTS = {"o_proj", "out_proj", "dense", "o", "out_lin", "c_proj", "proj", "linear_out", "wo", "to_out", "projection"}
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True)
class Linear:
    """A linear map, or a slice of the outputs of a fused one, which may alternate with others.

    The outputs of the whole are `groups` equal runs; of each the slice has those from `start` on, `outputs` in all.
    """

    path: str
    module: nn.Module
    inputs: int
    outputs: int
    start: int = 0
    part: str = ""
    groups: int = 1

    @property
    def rows(self) -> slice | Tensor:
        """The outputs of the whole that are the slice's."""
        if self.groups == 1:
            return slice(self.start, self.start + self.outputs)
        run, period = (
            self.outputs // self.groups,
            self.module.get_parameter("weight").numel() // self.inputs // self.groups,
        )
        starts = self.start + period * torch.arange(self.groups)
        return (starts[:, None] + torch.arange(run)).flatten()


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
    """A repeated layer of the model.

    width: d of the hidden states; feed_forward: its "intermediate" and "output" projections; mixer: where there is no
    attention, the maps from the width ("v") and back to it ("o") of what stands in its place.
    """

    path: str
    module: nn.Module
    layer: int
    stack: str
    width: int
    cores: tuple[Core, ...]
    feed_forward: dict[str, Linear]
    mixer: tuple[tuple[str, Linear], ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """What was read of a model.

    output: the map from hidden states to words, if the model has one of its own; outside: the linear maps of the whole
    model that are not in its base model, such as a classifier, with their paths in the whole; of_heads: the maps from
    hidden states to words of named heads, which come and go; None if the model has no named heads; interface: what the
    user says of the model.
    """

    base_model: Any
    blocks: list[Block]
    output: nn.Module | None = None
    outside: tuple[Linear, ...] = ()
    of_heads: tuple[nn.Module, ...] | None = None
    interface: AdapterModelInterface | None = None

    @property
    def onto_words(self) -> tuple[nn.Module, ...]:
        """All maps from hidden states to words."""
        return (self.of_heads or ()) if self.output is None else (self.output,)

    @functools.cached_property
    def towers(self) -> list[tuple[str, str]]:
        """The paths of models in the base model, with what its config calls theirs, without "_config"."""
        inside = {key: value for key, value in vars(self.base_model.config).items() if hasattr(value, "model_type")}
        types = Counter(config.model_type for config in inside.values())
        return [
            (path, key.removesuffix("_config"))
            for path, module in self.base_model.named_modules()
            for key, config in inside.items()
            if path and isinstance(module, PreTrainedModel)
            if module.config is config or (types[config.model_type], module.config.model_type) == (1, config.model_type)
        ]

    @property
    def depth(self) -> int:
        """The number of layers, counted as often as they are called where they share their weights."""
        declared = getattr(self.base_model.config, "num_hidden_layers", 0)
        return max(len(self.blocks), declared if isinstance(declared, int) else 0)  # LXMERT's is a dict

    @property
    def crosses(self) -> bool:
        """Whether any block attends to another stack."""
        return any(core.role == "cross_attention" for block in self.blocks for core in block.cores)


def read_blocks(base_model: nn.Module) -> list[Block]:
    """The blocks of a model in module order, numbered as 1.x numbers layers."""
    config = base_model.config
    swapped = getattr(config, "model_type", "") in SWAPPED_FEED_FORWARD
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    blocks = []
    for layer, (path, module) in enumerate(_repeated(base_model)):
        linears = linears_below(module, path)
        width = width_of(module, linears)
        cores = tuple(_cores(module, path, config, linears, width))
        attention = {linear.path for core in cores for linear in core.projections.values()}
        rest = [linear for linear in linears if linear.path not in attention]
        stack = "" if not encoder_decoder else "decoder" if "decoder" in path.split(".") else "encoder"
        feed_forward = _feed_forward(rest, width, swapped)
        mixer = () if cores else tuple(_mixer(rest, width, feed_forward))
        blocks.append(Block(path, module, layer, stack, width, cores, feed_forward, mixer))
    return blocks


def input_embeddings(model: Any) -> nn.Module | None:
    """What makes embeddings of the model's input; None if transformers does not know."""
    try:
        found: nn.Module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # the latter from a class that has not even the method
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
        for role, found in (*block.mixer, *block.feed_forward.items()):
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
    """Every linear map and convolution of a model but those of adapters, and those that nobody calls (torch's own)."""
    for name, module in model.named_children():
        below = f"{path}.{name}" if path else name
        shape = None if isinstance(module, NonDynamicallyQuantizableLinear) else linear_shape(module)
        shape = shape or convolution_shape(module)
        if shape is not None:
            yield Linear(below, module, *shape)
        if not isinstance(module, AdapterDict):
            yield from linear_maps(module, below)


def _repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks, by path: in the innermost lists of equal modules that all attend, and in lists of which some do.

    In a model without attention, the innermost lists of modules with two linear maps; without these, with convolutions.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    attends = {path: [_has_core(child) for child in module] for path, module in lists.items()}
    equal = [
        path
        for path, module in lists.items()
        if isinstance(module, nn.ModuleList) and all(attends[path]) and len({type(child) for child in module}) == 1
    ]
    chosen = [path for path in equal if not any(other.startswith(f"{path}.") for other in equal)]
    mixed = [path for path in lists if any(attends[path]) and all(_is_block(child) for child in lists[path])]
    for path in mixed:  # the outermost comes first
        if not any(path.startswith(f"{other}.") or other.startswith(f"{path}.") or path == other for other in chosen):
            chosen.append(path)
    for is_block in (_is_block, functools.partial(convolves, least=2), functools.partial(convolves, least=1)):
        plain = [path for path, module in lists.items() if all(map(is_block, module))] if not chosen else []
        chosen += [path for path in plain if not any(other.startswith(f"{path}.") for other in plain)]
    return [
        (f"{path}.{name}", child)
        for path, module in lists.items()
        if path in chosen
        for name, child in module.named_children()
    ]


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds two linear maps, and is no list or sequence itself."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    return sum(linear_shape(child) is not None for child in module.modules()) > 1


def _has_core(module: nn.Module) -> bool:
    return any(_core_parts(child) for child in module.modules())


@functools.cache
def _parts_of(name: str) -> tuple[str, ...]:
    return next((parts for parts, pattern in NAMES.items() if pattern.fullmatch(name)), ())


def _core_parts(module: nn.Module) -> dict[str, str]:
    """The names of the children that project to q, k and v: three, two, or one for all of them."""
    known = {name: _parts_of(name) for name in module._modules}
    known = {name: parts for name, parts in known.items() if parts and linear_shape(module._modules[name])}  # type: ignore[arg-type]
    found: dict[str, str] = {}
    for name in sorted(known, key=lambda name: len(known[name])):
        for part in known[name]:
            found.setdefault(part, name)
    return found if len(found) == len("qkv") and _attends(module, found) else {}


def _attends(module: nn.Module, parts: dict[str, str]) -> bool:
    """State-space and convolution mixers have an in_proj too; theirs is followed by a convolution."""
    if "in_proj" not in parts.values():
        return True
    inputs, outputs = linear_shape(module.get_submodule("in_proj")) or (0, 0)
    return outputs == 3 * inputs and not any("conv" in name for name in module._modules)


def linears_below(block: nn.Module, path: str) -> list[Linear]:
    """The linear maps in a block."""
    shapes = ((name, child, linear_shape(child)) for name, child in block.named_modules())
    return [Linear(f"{path}.{name}", child, *shape) for name, child, shape in shapes if shape]


def width_of(block: nn.Module, linears: list[Linear]) -> int:
    """d: of the sizes of its norms that some maps are given and some give, the one that most do, or ``channels_of``."""
    given, made = Counter(linear.inputs for linear in linears), Counter(linear.outputs for linear in linears)
    weights = (child._parameters.get("weight") for child in block.modules() if "norm" in type(child).__name__.lower())
    normed = {weight.shape[0] for weight in weights if weight is not None and weight.dim() == 1}
    both = given.keys() & made.keys()
    channels = channels_of(block)
    return max(both & normed or both or given, key=lambda size: given[size] + made[size], default=channels)


def _cores(block: nn.Module, path: str, config: object, linears: list[Linear], width: int) -> Iterator[Core]:
    by_path = {linear.path: linear for linear in linears}
    order = list(by_path)
    seen = False
    for name, module in block.named_modules():
        parts = _core_parts(module)
        if not parts:
            continue
        core_path = f"{path}.{name}" if name else path
        projections = {part: by_path[f"{core_path}.{parts[part]}"] for part in "qkv"}
        last = max(order.index(linear.path) for linear in projections.values())
        for child in dict.fromkeys(parts.values()):
            fused = [part for part in "qkv" if parts[part] == child]
            for position, part in enumerate(fused):
                if len(fused) > 1:
                    projections[part] = equal_slice(projections[part], part, position, len(fused))
        own = [other for other in order if other.startswith(f"{core_path}.") and other not in order[last:]]
        others = [by_path[other] for other in (*order[last + 1 :], *own)]
        output = next((linear for linear in others if _gives_output(linear, width, projections["v"].outputs)), None)
        if output is not None:
            projections["o"] = output
        across = seen or bool(CROSSES.search(core_path.removeprefix(path)) or CROSSES.search(type(block).__name__))
        role, seen = "cross_attention" if across else "self_attention", True
        yield Core(core_path, module, role, projections, head_width_of(module, config, projections))


def equal_slice(fused: Linear, part: str, position: int, parts: int) -> Linear:
    """One of equal thirds or halves: what is usual, until it is measured."""
    width = fused.outputs // parts
    return Linear(fused.path, fused.module, fused.inputs, width, position * width, part)


def _gives_output(linear: Linear, width: int, values: int) -> bool:
    """Whether a map after the core brings the heads' values, or a multiple of them, back to the width."""
    name = linear.path.rsplit(".", 1)[-1].lower()
    return name in OUTPUTS and linear.outputs == width and linear.inputs % values == 0


def head_width_of(module: nn.Module, config: object, projections: dict[str, Linear]) -> int:
    """The width of an attention's heads."""
    for name in HEAD_WIDTHS:
        if isinstance(width := getattr(module, name, None), int):
            return width
    heads = next((value for name in HEAD_COUNTS if isinstance(value := getattr(module, name, None), int)), None)
    if heads is None:
        heads = getattr(getattr(module, "config", config), "num_attention_heads", 1)
    return projections["q"].outputs // int(heads)


def _feed_forward(rest: list[Linear], width: int, swapped: bool) -> dict[str, Linear]:
    """The pair of maps from the width to an inner one and back; of several pairs the one with the widest inside."""
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


def _mixer(rest: list[Linear], width: int, feed_forward: dict[str, Linear]) -> Iterator[tuple[str, Linear]]:
    """What stands in the place of an attention's projections: maps from the width are "v", those back to it "o"."""
    beside = {linear.path.rpartition(".")[0] for linear in feed_forward.values()}
    for linear in rest:
        if linear.path.rpartition(".")[0] not in beside and width in (linear.inputs, linear.outputs):
            yield "v" if linear.inputs == width else "o", linear
