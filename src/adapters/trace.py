"""Finds where sub-layers begin and end, by watching one forward pass; no name of any architecture is needed.

A residual add is ``r + h`` where r is an ancestor of h. The *exit* is the outermost module whose output is h, up to
casts, views and scales; the *entry* the first module that is given r. If a norm is given r on the way, the model is
pre-norm; if not, the norm that is given ``r + h`` belongs to the sub-layer. ``r + (a + m)`` and ``(r + a) + m`` are two
sub-layers side by side. The pass runs on meta tensors, so its cost does not depend on the size of the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .context import AdapterSetup
from .errors import AdapterError
from .quantised import shapes_alone
from .samples import ROWS, Sample
from .sharded import without_loading
from .topology import Block

PASS_THROUGH = {"dropout", "to", "type", "type_as", "float", "contiguous", "reshape", "view", "clone", "flatten"}
PASS_THROUGH |= {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "div", "__truediv__", "unflatten"}
PASS_THROUGH |= {"unsqueeze", "squeeze"}
ANSWERS = {"__bool__": True, "__contains__": False, "equal": True}
"""What models ask of a tensor without data: is the whole mask seen (yes), is there a padding token (no)."""
ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Sublayer:
    """A sub-layer in terms of modules.

    entry: its first module that is given the residual stream r, as argument `argument`; exit: the module whose output
    (item `item` of it, if it is a tuple) is added to r; norm: the norm of that sum, None in a pre-norm model; width: d;
    rows, channels: the dimensions of the batch and of d in what the exit gives, or -1 where rows and positions are one.
    """

    entry: nn.Module
    argument: int | str
    exit: nn.Module
    item: int | None
    norm: nn.Module | None
    width: int = 0
    rows: int = 0
    channels: int = -1


@dataclass
class Call:
    """One call of a module: the tensors it was given, by argument, and those it gave back, by item."""

    module: nn.Module
    start: int
    inputs: dict[int | str, int]
    end: int = 0
    outputs: dict[int | None, int] = field(default_factory=dict)
    given: tuple[Any, ...] = ()


@dataclass
class Add:
    """One addition of two tensors of a shape, each by identity."""

    time: int
    terms: tuple[int, int]
    result: int


Produced = Mapping[int, tuple[Call, int | None]]
Sums = dict[int, tuple[int, tuple[int, ...]]]


class Watcher(TorchFunctionMode):
    """Notes every call of a module, every addition, and which tensor was made of which, with one clock for all."""

    def __init__(self, keep: Collection[nn.Module] = ()) -> None:
        """keep: the modules whose arguments are to be kept as they are."""
        super().__init__()
        self.keep = keep
        self.calls: list[Call] = []
        self.adds: list[Add] = []
        self.sources: dict[int, int] = {}
        self.born: dict[int, int] = {}
        self.parents: dict[int, set[int]] = {}
        self.alive: dict[int, Tensor] = {}
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
            self.alive[id(tensor)] = tensor
        return id(tensor)

    def source(self, tensor: int) -> int:
        """The tensor that `tensor` is a copy of, up to dropout, casts, views and scales."""
        while tensor in self.sources:
            tensor = self.sources[tensor]
        return tensor

    def ancestors(self, tensor: int, since: int) -> set[int]:
        """The tensors that `tensor` was made of, back to those that are older than `since`."""
        found: set[int] = set()
        open_ends = [tensor]
        while open_ends:
            for parent in self.parents.get(open_ends.pop(), ()):
                if parent not in found:
                    found.add(parent)
                    if self.born[parent] >= since:
                        open_ends.append(parent)
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and note what it did."""
        name = getattr(func, "__name__", "")
        if name in ANSWERS and any(given.is_meta for given in tensors_in(args)):
            return ANSWERS[name]
        result = func(*args, **(kwargs or {}))
        made = [self.note(tensor) for tensor in tensors_in([result])]
        if made:
            given = {self.note(tensor) for tensor in tensors_in((*args, *(kwargs or {}).values()))}
            if not (name in ADDS and made[0] in given):  # in place: it stays what it was before
                for tensor in made:
                    self.parents.setdefault(tensor, set()).update(given - {tensor})
            self._note_kind(name, args, result)
        return result

    def _note_kind(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        first, second = args[0], args[1] if len(args) > 1 else None
        if name in ADDS and isinstance(second, Tensor) and first.shape == second.shape:
            self.adds.append(Add(self.tick(), (self.note(first), self.note(second)), self.note(result)))
        elif name in PASS_THROUGH and result is not first:
            whole = [term for term in (first, second) if isinstance(term, Tensor) and term.numel() == result.numel()]
            if whole and len({term.dim() for term in whole}) == len(whole):  # else it is a product of two states
                self.sources[self.note(result)] = self.note(max(whole, key=Tensor.dim))

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        inputs = {key: self.note(value) for key, value in given if isinstance(value, Tensor)}
        call = Call(module, self.tick(), inputs, given=(args, kwargs) if module in self.keep else ())
        self.calls.append(call)
        self._open.append(call)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module returns."""
        call = self._open.pop()
        call.end = self.tick()
        given: dict[int | None, Any] = dict(enumerate(output)) if isinstance(output, tuple) else {None: output}
        call.outputs = {item: self.note(value) for item, value in given.items() if isinstance(value, Tensor)}


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among some values, and in tuples and lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def trace_sublayers(base_model: nn.Module, blocks: list[Block]) -> dict[str, dict[str, Sublayer]]:
    """For every block path, its sub-layers by role: "self_attention", "cross_attention", "feed_forward".

    Raises:
        AdapterError: no block can be run.
    """
    found: dict[str, dict[str, Sublayer]] = {}
    reason: Exception | None = None
    for part in parts(base_model):
        missing = [block for block in blocks if block.path not in found and block.module in set(part.modules())]
        if not missing:
            continue
        watcher = Watcher()
        try:
            watch(watcher, part, missing)
        except Exception as error:
            reason = reason or error
        modules = {block.module for block in missing}
        found |= {block.path: _of_block(watcher, block, modules) for block in missing if _call_of(watcher, block)}
    if reason is not None and not found:
        raise AdapterError(
            f"add_adapter: where the sub-layers of {type(base_model).__name__} begin and end could not be read, since "
            f"a pass on the smallest input failed: {reason}; use LoRA for this model."
        ) from reason
    return found


def parts(base_model: nn.Module) -> Iterator[nn.Module]:
    """The model, and for what it cannot reach the models inside it that hold blocks, from large to small."""
    yield base_model
    for module in base_model.modules():
        if module is not base_model and isinstance(module, PreTrainedModel):
            yield module


def _call_of(watcher: Watcher, block: Block) -> Call | None:
    """The first call of a block that came to its end."""
    return next((call for call in watcher.calls if call.module is block.module and call.end), None)


def _of_block(watcher: Watcher, block: Block, blocks: Collection[nn.Module]) -> dict[str, Sublayer]:
    """The sub-layers by role; in a block without attention what comes first, and is not all, stands in its place.

    Where the block adds nothing itself, those between its call and that of the next of `blocks`.
    """
    whole = _call_of(watcher, block)
    found = [] if whole is None else list(_sublayers(watcher, block, whole))
    if whole is not None and not found:
        following = (call.start for call in watcher.calls if call.start > whole.end and call.module in blocks)
        around = replace(whole, start=whole.start - 1, end=next(following, watcher.tick()))
        found = list(_sublayers(watcher, block, around))
    if not block.cores and len(found) > 1:
        found[0] = "self_attention", found[0][1]
    return dict(found)


def watch(watcher: Watcher, model: nn.Module, blocks: list[Block]) -> None:
    """Let `watcher` see one pass of a model."""
    named = (*model.named_parameters(), *model.named_buffers())
    meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in named}
    cross = any(core.role == "cross_attention" for block in blocks for core in block.cores)
    try:
        inputs = _inputs(model, torch.device("meta"), cross)
        _run(watcher, model, lambda: functional_call(model, meta, (), inputs))
    except (NotImplementedError, RuntimeError):  # an operator has no meta form: the real weights, on a tiny input
        watcher.__init__(watcher.keep)  # type: ignore[misc]
        inputs = _inputs(model, next(model.parameters()).device, cross)
        _run(watcher, model, lambda: model(**inputs))


def _run(watcher: Watcher, base_model: nn.Module, call: Callable[[], Any]) -> None:
    hooked, alone = _hooked(base_model, watcher), without_loading(base_model)
    with torch.no_grad(), AdapterSetup(None), _evaluating(base_model), alone, hooked, shapes_alone(base_model), watcher:
        call()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and with feed-forward layers that see whole sequences: a chunk is none of them."""
    modes = [(module, module.training) for module in model.modules()]
    chunks: Any = {m: m.chunk_size_feed_forward for m in model.modules() if vars(m).get("chunk_size_feed_forward")}
    model.eval()
    for module in chunks:
        module.chunk_size_feed_forward = 0
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, size in chunks.items():
            module.chunk_size_feed_forward = size


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
    sample = Sample(model, device)
    inputs = sample.inputs()
    if cross and "encoder_hidden_states" in sample.accepted and "decoder_input_ids" not in inputs:
        width = sample.number("encoder_hidden_size cross_attention_hidden_size hidden_size d_model")
        inputs["encoder_hidden_states"] = sample.zeros(4, width)
    if "use_cache" in sample.accepted or getattr(model.config, "use_cache", None) is not None:
        inputs["use_cache"] = False
    return inputs


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _sublayers(watcher: Watcher, block: Block, whole: Call) -> Iterator[tuple[str, Sublayer]]:
    inside = [call for call in watcher.calls if whole.start < call.start and call.end and call.end < whole.end]
    produced = _producers(inside)
    roles = {core.module: core.role for core in block.cores}  # of one whose query is not called
    roles |= {core.projections["q"].module: core.role for core in block.cores}
    sums: Sums = {}
    stream: dict[int, int] = {}
    for add in watcher.adds:
        if not whole.start < add.time < whole.end:
            continue
        for residual, hidden in _residuals(watcher, add, sums, stream, produced):
            found = _sublayer(watcher, add, residual, hidden, [whole, *inside], produced, block.width)
            if found is not None:
                made_of = watcher.ancestors(hidden, watcher.born[residual])
                yield _role(roles, inside, made_of | {hidden}, residual, watcher), found


def _residuals(
    watcher: Watcher, add: Add, sums: Sums, stream: dict[int, int], produced: Produced
) -> Iterator[tuple[int, int]]:
    """The pairs (r, h) of an addition: one, several side by side, or none.

    sums: what was added up that has no residual; stream: for the sum of a residual and a sub-layer, the residual.
    """
    one, other = add.terms
    for residual, hidden in ((one, other), (other, one)):
        root = watcher.source(residual)
        made_of = watcher.ancestors(hidden, 0)
        if residual in made_of or root in made_of:
            origin = residual if residual in made_of else root
        elif root in stream and stream[root] in made_of:
            origin = stream[root]
        else:
            continue
        stream[add.result] = origin
        base = watcher.source(hidden)
        time, terms = sums.get(base, (0, (hidden,)))
        giver = produced.get(hidden) or produced.get(base)
        apart = base in sums and (giver is None or giver[0].end < time)  # else one module gives the sum
        yield from ((origin, term) for term in (terms if apart else (hidden,)))
        return
    flat = (sums[base][1] if (base := watcher.source(term)) in sums else (term,) for term in add.terms)
    sums[add.result] = add.time, tuple(term for terms in flat for term in terms)


def _sublayer(
    watcher: Watcher, add: Add, residual: int, hidden: int, calls: list[Call], produced: Produced, width: int
) -> Sublayer | None:
    """The sub-layer whose output is `hidden`, in terms of modules; None if no module gives it."""
    exit_call, item = produced.get(hidden) or produced.get(watcher.source(hidden)) or (None, None)
    if exit_call is None:
        return None
    same = {residual, watcher.source(residual)}
    within = [call for call in calls if call.start < exit_call.end and not same.isdisjoint(call.inputs.values())]
    given = [call for call in within if call.start >= watcher.born[residual] and call is not calls[0]] or within[:1]
    if not given:
        return None
    entry = given[0]
    before = any(_is_norm(call.module) for call in given)
    argument = next(key for key, tensor in entry.inputs.items() if tensor in same)
    layout = _layout(watcher.alive[exit_call.outputs[item]].shape, width)
    norm = None if before else _norm_of(calls[1:], add)
    return Sublayer(entry.module, argument, exit_call.module, item, norm, *layout)


def _layout(shape: torch.Size, width: int) -> tuple[int, int, int]:
    """(d, the batch's dimension, d's dimension) of what an exit gives."""
    channels = 1 if len(shape) == 4 and shape[1] == width != shape[-1] else len(shape) - 1
    rows = next((place for place, size in enumerate(shape) if size == ROWS and place != channels), -1)
    return shape[channels], rows, channels - len(shape) if channels > 1 else channels


def _role(roles: dict[nn.Module, str], calls: list[Call], made_of: set[int], residual: int, watcher: Watcher) -> str:
    """That of the attention whose query lies between r and h; without one it is a feed-forward block."""
    for call in calls:
        since = any(watcher.born[tensor] > watcher.born[residual] for tensor in call.outputs.values())
        if call.module in roles and since and not made_of.isdisjoint(call.outputs.values()):
            return roles[call.module]
    return "feed_forward"


def _producers(calls: list[Call]) -> Produced:
    """For every tensor the last call to give it back: the outermost module whose output it is.

    A module that the block calls more than once (one dropout for all sub-layers) is no exit of any of them.
    """
    found: dict[int, tuple[Call, int | None]] = {}
    times = Counter(call.module for call in calls)
    for call in sorted((call for call in calls if times[call.module] == 1), key=lambda call: call.end):
        for item, tensor in call.outputs.items():
            found[tensor] = (call, item)
    return found


def _norm_of(calls: list[Call], add: Add) -> nn.Module | None:
    given = (call for call in calls if call.start > add.time and call.inputs.get(0) == add.result)
    following = next(given, None)
    return following.module if following and _is_norm(following.module) else None
