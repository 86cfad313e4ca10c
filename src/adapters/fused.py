"""Measures which outputs of a fused projection are the query, the key and the value of an attention.

Neither names nor shapes tell whether they come one after the other, head by head, or in groups. So one attention of
each kind runs by itself on a tiny input, with the fused map's output as a leaf: the outputs with a gradient from the
query are the query's. Its weights are one number each, so that the size of the model costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from .topology import Block, Core, Linear
from .trace import Watcher, watch

PRODUCTS = {"matmul": 0, "__matmul__": 0, "bmm": 0, "baddbmm": 1, "einsum": 1}
"""Products of two tensors, by the place of the first."""
KNOWN = "c_attn"
Layout = tuple[int, int, int]
_LAYOUTS: dict[Any, dict[str, Layout] | None] = {}


def with_layouts(base_model: nn.Module, blocks: list[Block]) -> list[Block]:
    """The blocks with the slices of fused projections as they are measured.

    A fused projection whose parts cannot be told apart is no attention's: it is among the block's other maps.
    """
    unknown = [core for block in blocks for core in block.cores if _is_unknown(core)]
    needed = {_key(base_model, core): core for core in reversed(unknown)}  # the first of each kind
    missing = {key: core for key, core in needed.items() if key not in _LAYOUTS}
    if missing:
        watcher = _Glance(keep={core.module for core in missing.values()})
        attempt(functools.partial(watch, watcher, base_model, blocks))
        for key, core in missing.items():
            call = next((call for call in watcher.calls if call.module is core.module and call.given), None)
            _LAYOUTS[key] = None if call is None else attempt(functools.partial(_measured, core, *call.given))
    return [_with_layout(base_model, block) if any(map(_is_unknown, block.cores)) else block for block in blocks]


class _Seen(Exception):
    """All that was to be seen of a pass was seen."""


class _Glance(Watcher):
    """Ends the pass as soon as all modules that are to be kept were called."""

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        super().enter(module, args, kwargs)
        if module in self.keep and {call.module for call in self.calls}.issuperset(self.keep):
            raise _Seen


def attempt(measure: Callable[[], Any]) -> Any:
    """None where a model's own code does not run on such inputs, whatever it says."""
    try:
        return measure()
    except Exception:
        return None


def _key(base_model: nn.Module, core: Core) -> Any:
    shapes = tuple(
        (part, found.inputs, found.outputs, found.path.rsplit(".", 1)[-1]) for part, found in core.projections.items()
    )
    return type(base_model), type(core.module), core.head_width, shapes


def _is_unknown(core: Core) -> bool:
    """Whether a part of the core is a slice, unless it is one of GPT-2's equal parts, which have always been so."""
    slices = [found for found in core.projections.values() if found.part]
    return any(not found.path.endswith(KNOWN) or found.inputs != found.outputs for found in slices)


def _with_layout(base_model: nn.Module, block: Block) -> Block:
    cores, mixer = [], list(block.mixer)
    for core in block.cores:
        layouts = _LAYOUTS.get(_key(base_model, core)) if _is_unknown(core) else {}
        if layouts is None:
            whole = {found.path: found for found in core.projections.values()}.values()
            mixer += [("v" if found.inputs == block.width else "o", _undivided(found)) for found in whole]
        else:
            parts = {part: _part(found, part, layouts) for part, found in core.projections.items()}
            cores.append(replace(core, projections=parts))
    return replace(block, cores=tuple(cores), mixer=tuple(mixer))


def _undivided(found: Linear) -> Linear:
    outputs = found.module.get_parameter("weight").numel() // found.inputs
    return Linear(found.path, found.module, found.inputs, outputs)


def _part(found: Linear, part: str, layouts: dict[str, Layout]) -> Linear:
    if not found.part or part not in layouts:
        return found
    groups, start, outputs = layouts[part]
    return replace(found, groups=groups, start=start, outputs=outputs)


def _measured(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Layout]:
    """(groups, start, outputs) of every part that is a slice."""
    seer = _Seer()
    weights = {name: _like(tensor, alike=True) for name, tensor in core.module.state_dict(keep_vars=True).items()}
    leaves: dict[nn.Module, Tensor] = {}

    def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves[module] = torch.randn_like(output, dtype=torch.float32).requires_grad_(True)
        return leaves[module]

    fused = {found.module for found in core.projections.values() if found.part}
    handles = [module.register_forward_hook(as_leaf) for module in fused]
    try:
        with torch.random.fork_rng(), torch.enable_grad(), seer:
            functional_call(core.module, weights, _real(args), _real(kwargs))
    finally:
        for handle in handles:
            handle.remove()
    seen = dict(zip("qkv", seer.attended(), strict=True))
    return {part: _layout(leaves[found.module], seen[part]) for part, found in core.projections.items() if found.part}


class _Seer(TorchFunctionMode):
    """Notes what attention is computed of: the arguments of the fused function, or of the products around a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: tuple[Tensor, ...] = ()
        self.scored: tuple[Tensor, ...] = ()
        self.softened = False
        self.weighted: tuple[Tensor, ...] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and note what it was given."""
        name = getattr(func, "__name__", "")
        given = (*args, *(kwargs or {}).values())
        if name == "scaled_dot_product_attention" and not self.fused:
            self.fused = given[:3]
        elif name in PRODUCTS:
            pair = given[PRODUCTS[name] : PRODUCTS[name] + 2]
            if not self.softened and not self.scored:
                self.scored = pair
            elif self.softened and not self.weighted:
                self.weighted = pair
        self.softened |= name == "softmax"
        if name == "linear" and not any(args[1].stride()):  # all weights are one number: a product would copy them
            product = (args[0].sum(-1, keepdim=True) * args[1][0, 0]).expand(*args[0].shape[:-1], len(args[1]))
            return product if len(args) < 3 or args[2] is None else product + args[2]
        return func(*args, **(kwargs or {}))

    def attended(self) -> tuple[Tensor, ...]:
        """Query, key and value."""
        return self.fused or (*self.scored, self.weighted[1])


def _layout(leaf: Tensor, seen: Tensor) -> Layout:
    (gradient,) = torch.autograd.grad(seen, leaf, torch.randn_like(seen), retain_graph=True)
    own = gradient.flatten(0, -2).abs().sum(0) > 0
    for groups in range(1, len(own) // 2 + 1):
        if len(own) % groups == 0:
            rows = own.view(groups, -1)
            places = rows[0].nonzero()[:, 0].tolist()
            if (rows == rows[0]).all() and places == list(range(places[0], places[0] + len(places))):
                return groups, places[0], groups * len(places)
    raise ValueError("the parts of a fused projection alternate without a rule")


def _real(value: Any) -> Any:
    """With data in place of tensors that have none."""
    if isinstance(value, Tensor):
        return _like(value, alike=False)
    if isinstance(value, dict):
        return {name: _real(entry) for name, entry in value.items()}
    return type(value)(_real(entry) for entry in value) if type(value) in (tuple, list) else value


def _like(tensor: Tensor, alike: bool) -> Tensor:
    """Chance, all alike for weights; nothing is masked, and all positions are the first."""
    shape, dtype = tensor.shape, tensor.dtype
    if not tensor.is_floating_point():
        return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
    if tensor.dim() == 4:  # a mask
        return torch.zeros(shape)
    return torch.full((1,) * tensor.dim(), 0.1).expand(shape) if alike else torch.randn(shape)
