"""Finds where sub-layers begin and end, by watching one forward pass; no name of any architecture is needed.

A residual add is ``r + h`` where h comes out of modules that were given r. The *exit* is the outermost module whose
output is h, the *entry* the first one that is given r. If a norm is given r on the way, the model is pre-norm; if not,
the norm that is given ``r + h`` belongs to the sub-layer. The pass runs on meta tensors, so its cost does not depend on
the size of the weights.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from .context import AdapterSetup
from .errors import AdapterError
from .quantised import is_quantised
from .topology import Block, linear_shape

PASS_THROUGH = {"dropout", "to", "type", "type_as", "float", "contiguous", "reshape", "view", "clone"}
ANSWERS = {"__bool__": True, "__contains__": False}
"""What models ask of a tensor without data: is the whole mask seen (yes), is there a padding token (no)."""
ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


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


@dataclass
class Call:
    """One call of a module: the tensors it was given, by argument, and those it gave back, by item."""

    module: nn.Module
    start: int
    inputs: dict[int | str, int]
    end: int = 0
    outputs: dict[int | None, int] = field(default_factory=dict)


@dataclass
class Add:
    """One addition of two tensors of a shape, each by identity."""

    time: int
    terms: tuple[int, int]
    result: int


class Watcher(TorchFunctionMode):
    """Notes every call of a module and every addition, with one clock for both."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.adds: list[Add] = []
        self.sources: dict[int, int] = {}
        self.born: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._open: list[Call] = []
        self._clock = 0

    def tick(self) -> int:
        """The next moment."""
        self._clock += 1
        return self._clock

    def note(self, tensor: Tensor) -> int:
        """The identity of a tensor, which is kept alive so that no other can take it."""
        if id(tensor) not in self.born:
            self.born[id(tensor)] = self._clock
            self._alive.append(tensor)
        return id(tensor)

    def source(self, tensor: int) -> int:
        """The tensor that `tensor` is a copy of, up to dropout, casts and views."""
        while tensor in self.sources:
            tensor = self.sources[tensor]
        return tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and note what it did."""
        name = getattr(func, "__name__", "")
        if name in ANSWERS and args[0].is_meta:
            return ANSWERS[name]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
            if name in ADDS and len(args) > 1 and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
                terms = (self.note(args[0]), self.note(args[1]))
                self.adds.append(Add(self.tick(), terms, self.note(result)))
            elif name in PASS_THROUGH and result is not args[0] and result.numel() == args[0].numel():
                self.sources[self.note(result)] = self.note(args[0])
        return result

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        inputs = {key: self.note(value) for key, value in given if isinstance(value, Tensor)}
        call = Call(module, self.tick(), inputs)
        self.calls.append(call)
        self._open.append(call)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module returns."""
        call = self._open.pop()
        call.end = self.tick()
        given: dict[int | None, Any] = dict(enumerate(output)) if isinstance(output, tuple) else {None: output}
        call.outputs = {item: self.note(value) for item, value in given.items() if isinstance(value, Tensor)}


def trace_sublayers(base_model: nn.Module, blocks: list[Block]) -> dict[str, dict[str, Sublayer]]:
    """For every block path, its sub-layers by role: "self_attention", "cross_attention", "feed_forward"."""
    watcher = _watch_or_refuse(base_model, blocks)
    first_calls: dict[nn.Module, Call] = {}
    for call in watcher.calls:
        first_calls.setdefault(call.module, call)
    return {
        block.path: dict(_sublayers(watcher, block, first_calls[block.module]))
        for block in blocks
        if block.module in first_calls
    }


def _watch_or_refuse(base_model: nn.Module, blocks: list[Block]) -> Watcher:
    try:
        return _watch(base_model, blocks)
    except Exception as error:
        raise AdapterError(
            f"add_adapter: where the sub-layers of {type(base_model).__name__} begin and end could not be read, since "
            f"a pass on the smallest input failed: {error}; use LoRA or prefix tuning for this model."
        ) from error


def _watch(base_model: nn.Module, blocks: list[Block]) -> Watcher:
    tensors = {**dict(base_model.named_parameters()), **dict(base_model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    cross = any(core.role == "cross_attention" for block in blocks for core in block.cores)
    try:
        inputs = _inputs(base_model, torch.device("meta"), cross)
        return _run(base_model, lambda: functional_call(base_model, meta, (), inputs))
    except (NotImplementedError, RuntimeError):  # an operator has no meta form: the real weights, on a tiny input
        inputs = _inputs(base_model, next(base_model.parameters()).device, cross)
        return _run(base_model, lambda: base_model(**inputs))


def _run(base_model: nn.Module, call: Callable[[], Any]) -> Watcher:
    watcher = Watcher()
    hooked = _hooked(base_model, watcher)
    with torch.no_grad(), AdapterSetup(None), _evaluating(base_model), hooked, _shapes_alone(base_model), watcher:
        call()
    return watcher


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and with feed-forward layers that see whole sequences: a chunk is none of them."""
    modes = [(module, module.training) for module in model.modules()]
    chunks = [module for module in model.modules() if vars(module).get("chunk_size_feed_forward")]
    sizes = [module.chunk_size_feed_forward for module in chunks]
    model.eval()
    for module in chunks:
        module.chunk_size_feed_forward = 0  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, size in zip(chunks, sizes, strict=True):
            module.chunk_size_feed_forward = size


@contextmanager
def _shapes_alone(model: nn.Module) -> Iterator[None]:
    """Quantised maps, which have no meta form, give tensors of the right shape."""
    maps = [module for module in model.modules() if is_quantised(module)]
    own = [vars(module).get("forward") for module in maps]
    for module in maps:
        _, outputs = linear_shape(module) or (0, 0)
        vars(module)["forward"] = lambda x, outputs=outputs: x.new_zeros(*x.shape[:-1], outputs)
    try:
        yield
    finally:
        for module, forward in zip(maps, own, strict=True):
            vars(module).pop("forward")
            if forward is not None:  # a wrapper's, such as accelerate's
                vars(module)["forward"] = forward


@contextmanager
def _hooked(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(watcher.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watcher.leave, always_call=False))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(model: nn.Module, device: torch.device, cross: bool) -> dict[str, Any]:
    """The smallest inputs that the model runs on."""
    config: Any = model.config
    name = str(getattr(model, "main_input_name", "input_ids"))
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs[name] = torch.zeros(1, config.num_channels, height, width, device=device)
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        inputs[name] = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions, device=device)
    else:
        inputs[name] = torch.ones(1, 4, dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = torch.ones(1, 4, dtype=torch.long, device=device)
    elif cross:
        inputs["encoder_hidden_states"] = torch.zeros(1, 4, config.hidden_size, device=device)
    if "use_cache" in accepted or getattr(config, "use_cache", None) is not None:
        inputs["use_cache"] = False
    return inputs


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _sublayers(watcher: Watcher, block: Block, whole: Call) -> Iterator[tuple[str, Sublayer]]:
    inside = [call for call in watcher.calls if whole.start < call.start and call.end < whole.end]
    produced = _producers(inside)
    roles = {core.projections["q"].module: core.role for core in block.cores}
    for add in watcher.adds:
        if not whole.start < add.time < whole.end:
            continue
        residual, exit_call, item = _terms(watcher, add, produced)
        if exit_call is None:
            continue
        within = [call for call in inside if call.end < add.time and call.start > watcher.born[residual]]
        given = [call for call in within if residual in call.inputs.values()]
        if not given or given[0].start > exit_call.end:
            continue
        entry = given[0]
        passed = [call for call in within if call.start >= entry.start]
        role = next((roles[call.module] for call in passed if call.module in roles), "feed_forward")
        before = any(_is_norm(call.module) for call in given)
        norm = None if before else _norm_of(inside, add)
        argument = next(key for key, tensor in entry.inputs.items() if tensor == residual)
        yield role, Sublayer(entry.module, argument, exit_call.module, item, norm)


def _producers(calls: list[Call]) -> Mapping[int, tuple[Call, int | None]]:
    """For every tensor the last call to give it back: the outermost module whose output it is.

    A module that the block calls more than once (one dropout for all sub-layers) is no exit of any of them.
    """
    found: dict[int, tuple[Call, int | None]] = {}
    times = Counter(call.module for call in calls)
    for call in sorted((call for call in calls if times[call.module] == 1), key=lambda call: call.end):
        for item, tensor in call.outputs.items():
            found[tensor] = (call, item)
    return found


def _terms(
    watcher: Watcher, add: Add, produced: Mapping[int, tuple[Call, int | None]]
) -> tuple[int, Call | None, int | None]:
    """Of the two terms r is the older; h must be some module's output."""
    residual, hidden = sorted(add.terms, key=lambda term: watcher.born[watcher.source(term)])
    call, item = produced.get(hidden) or produced.get(watcher.source(hidden)) or (None, None)
    return residual, call, item


def _norm_of(calls: list[Call], add: Add) -> nn.Module | None:
    given = (call for call in calls if call.start > add.time and call.inputs.get(0) == add.result)
    following = next(given, None)
    return following.module if following and _is_norm(following.module) else None
