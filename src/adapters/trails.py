"""What becomes of scores on their way from a product of queries and keys to a softmax, and of weights after it.

What a module does to the scores of its tokens, operation by operation, is done to those of a prefix too: scales, casts,
views and turns. What is added to scores or filled into them is for tokens alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError
from .signals import PrefixSignal

Step = Callable[[Tensor], Tensor]

PRODUCTS = {"matmul": "other tensor2", "bmm": "mat2", "baddbmm": "batch1 batch2", "einsum": ""}
"""Products of two tensors, and how these may be named."""
SCALES: dict[str, Callable[..., Tensor]] = {"mul": torch.mul, "rmul": torch.mul, "imul": torch.mul}
SCALES |= dict.fromkeys(("div", "truediv", "itruediv", "true_divide"), torch.div)
SHIFTS: dict[str, Callable[..., Tensor]] = dict.fromkeys(("add", "radd", "iadd"), torch.add)
SHIFTS |= dict.fromkeys(("sub", "isub"), torch.sub)
FILLS = {"masked_fill", "where", "maximum", "max"}
VIEWS = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "clone", "expand", "detach"}
VIEWS |= {"to", "type", "type_as", "float", "half", "bfloat16", "double", "expand_as", "view_as", "reshape_as"}
TURNS = {"transpose", "permute", "swapaxes", "swapdims", "movedim"}
ALIKE = {"dropout", "clamp", "tanh", "nan_to_num"}
PEAKS = {"amax"}
"""Operations by what they mean for scores: what is done to those of tokens is done to the prefix's too, but for shifts
and fills; views and casts are made up for at the end."""


@dataclass(frozen=True, eq=False)
class Product:
    """A product of queries and keys: `number` in the order of the pass; scales: what was done to the keys before.

    differentiated: it was made where autograd sees it.
    """

    number: int
    queries: Tensor
    keys: Tensor
    pattern: Pattern
    factor: float
    scales: tuple[Step, ...]
    differentiated: bool

    def scores(self, prefix: PrefixSignal) -> Tensor:
        """(…, q, p) of the prefix."""
        keys = laid(prefix.key, self.pattern.canonical(self.keys).shape[:-2]).transpose(-1, -2)
        for scale in self.scales:
            keys = scale(keys)
        return self.factor * self.pattern.multiply(self.queries, keys.to(self.keys.dtype))


@dataclass(frozen=True, eq=False)
class Weights:
    """A softmax's weights of the prefix (…, q, p)."""

    prefix: PrefixSignal
    own: Tensor


@dataclass(frozen=True, eq=False)
class Trail:
    """What a tensor comes from and what was done to that since; lost: an operation that cannot be followed.

    level: it is one number for all keys, such as the highest of scores.
    """

    tensor: Tensor
    origin: Product | Weights | None
    steps: tuple[Step, ...] = ()
    lost: str = ""
    level: bool = False

    def replay(self, values: Tensor) -> Tensor:
        """`values` with all that was done to the origin."""
        for step in self.steps:
            values = step(values)
        return values


@dataclass(frozen=True)
class Pattern:
    """What the dimensions of a product's second operand are; "" for the plain product of matrices.

    order: the dimensions of the second operand that bring it to (…, contracted, free).
    """

    equation: str = ""
    contracted: str = ""
    free: str = ""
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, equation: str) -> Pattern | None:
        """None if it is no product of two matrices for each of some rows."""
        given, _, output = equation.replace(" ", "").partition("->")
        first, _, second = given.partition(",")
        contracted = [letter for letter in second if letter in first and letter not in output]
        free = [letter for letter in second if letter not in first and letter in output]
        lead = [letter for letter in second if letter in first and letter in output]
        if len(contracted) != 1 or len(free) != 1 or len(lead) + 2 != len(second):
            return None
        order = tuple(map(second.index, (*lead, *contracted, *free)))
        return cls(f"{first},{second}->{output}", contracted[0], free[0], order)

    @property
    def gives_scores(self) -> bool:
        """Whether the second operand's own dimension is the last of the result."""
        return self.equation.endswith(self.free)

    @property
    def takes_weights(self) -> bool:
        """Whether the contracted dimension is the last of the first operand."""
        return self.equation.partition(",")[0].endswith(self.contracted)

    def canonical(self, second: Tensor) -> Tensor:
        """The second operand as (…, contracted, free)."""
        return second.permute(self.order) if self.equation else second

    @property
    def ends_free(self) -> bool:
        """Whether the second operand's own dimension is the last of the result."""
        first, _, output = self.equation.partition("->")
        return not output or first.partition(",")[2].find(output[-1]) == self.order[-1]

    @property
    def ends_contracted(self) -> bool:
        """Whether the contracted dimension is the last of the first operand."""
        first, _, second = self.equation.partition("->")[0].partition(",")
        return not first or second.find(first[-1]) == self.order[-2]

    def multiply(self, first: Tensor, second: Tensor) -> Tensor:
        """The product with a second operand (…, contracted, free)."""
        if not self.equation:
            return torch.matmul(first, second)
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return torch.einsum(self.equation, first, second.permute(back))


@dataclass(frozen=True, eq=False)
class Again:
    """A call of an operation and what it gave."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def with_(self, old: Tensor, new: Tensor) -> Tensor:
        """The same with another tensor in the place of one."""
        args = (new if value is old else value for value in self.args)
        kwargs = {name: new if value is old else value for name, value in self.kwargs.items()}
        made: Tensor = self.func(*args, **kwargs)
        return made

    def beside(self, tensor: Tensor) -> Any:
        """The other one of two arguments."""
        place = next((place for place, value in enumerate(self.args[:2]) if value is tensor), None)
        if place is None or len(self.args) < 2:
            return self.kwargs.get("other")
        return self.args[1 - place]


def laid(prefix: Tensor, lead: Sequence[int]) -> Tensor:
    """(b, heads, m, n) as (*lead, m, n), where `lead` are rows and heads, in one dimension or more.

    Windows of a row follow each other, and so do the heads of a group that has one key head; further dimensions are
    of blocks that all have the same prefix.

    Raises:
        AdapterError: it fits in no such way.
    """
    rows, heads, *size = prefix.shape
    total = math.prod(lead)
    if total == rows * heads:
        return prefix.reshape(*lead, *size)
    places = [place for place in range(1, len(lead)) if lead[place] % heads == 0]
    exact = [place for place in places if lead[place] == heads] or places
    if exact and lead[0] % rows == 0:
        prefix = prefix.repeat_interleave(lead[0] // rows, 0).repeat_interleave(lead[exact[0]] // heads, 1)
        ones = [lead[0], *(lead[place] if place == exact[0] else 1 for place in range(1, len(lead)))]
        return prefix.view(*ones, *size).expand(*lead, *size)
    if len(lead) == 1 and total % (rows * heads) == 0:
        return prefix[:, None].expand(rows, total // rows // heads, *prefix.shape[1:]).reshape(*lead, *size)
    raise AdapterError(
        f"prefix tuning: keys and values are of {rows} rows and {heads} heads, which do not fit an attention over "
        f"{tuple(lead)}; use LoRA or a bottleneck adapter for this model."
    )


def operands(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Pattern | None, tuple[Tensor, Tensor] | None, float]:
    """How two tensors are multiplied, the two, and by what the product is."""
    if name == "einsum":
        equation, *operands = args
        operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
        return Pattern.of(equation), (tuple(operands) if len(operands) == 2 else None), 1.0
    values = [*args, *(kwargs[key] for key in PRODUCTS[name].split() if key in kwargs)]
    first, second = values[1:3] if name == "baddbmm" else values[:2]
    return Pattern(), (first, second), kwargs.get("alpha", 1.0)


def rank(trail: Trail) -> tuple[bool, bool, bool, int]:
    """Scores before what was lost, the first product before others."""
    number = trail.origin.number if isinstance(trail.origin, Product) else -1
    return trail.origin is None, trail.lost != "", trail.level, number


def on_keys(name: str, main: Trail, call: Again) -> tuple[Step, ...] | None:
    """What is done to a tensor that is not scores, but may be keys: by one number each; None if it is more."""
    if name in VIEWS or name in TURNS:
        return ()
    if name in SCALES and call.args[0] is main.tensor and _count(call.beside(main.tensor)) == 1:
        return (functools.partial(_scaled, SCALES[name], call.beside(main.tensor)),)
    return None


def on_scores(name: str, main: Trail, call: Again, levels: list[Tensor]) -> tuple[Step, ...] | None:
    """What is done to scores, or to weights, of the prefix; None if that is not known."""
    scores, other, result = main.tensor, call.beside(main.tensor), call.result
    softened = isinstance(main.origin, Weights)
    if main.level:
        return () if name in VIEWS or name in TURNS else None
    if name in SCALES and (SCALES[name] is torch.mul or call.args[0] is scores) and _is_even(other):
        return (functools.partial(_scaled, SCALES[name], other),)
    masked = name in SCALES and SCALES[name] is torch.mul and not _is_even(other)
    if name in PEAKS and not softened:
        return ()
    if name in SHIFTS and any(other is level for level in levels):
        return (functools.partial(_scaled, SHIFTS[name], other),)
    shifted = name in SHIFTS and not softened and (SHIFTS[name] is torch.add or call.args[0] is scores)
    if shifted or masked or name in FILLS or name in VIEWS:
        fits = result.dim() > 0 and result.shape[-1] == scores.shape[-1]
        return (functools.partial(_as_lead, result.shape[:-1]),) if fits else None
    if name in TURNS:
        probe = call.with_(scores, torch.empty(*range(2, scores.dim() + 2), device="meta"))
        return (functools.partial(call.with_, scores),) if probe.shape[-1] == scores.dim() + 1 else None
    return (functools.partial(call.with_, scores),) if name in ALIKE else None


def _count(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


def _is_even(other: Any) -> bool:
    """Whether a factor is the same for all keys."""
    return _count(other) == 1 or other.shape[-1] == 1


def _scaled(operation: Callable[..., Tensor], other: Any, values: Tensor) -> Tensor:
    return operation(values, other)


def _as_lead(lead: Sequence[int], values: Tensor) -> Tensor:
    """(…, p) as (*lead, p)."""
    if math.prod(values.shape[:-1]) == math.prod(lead):
        return values.reshape(*lead, values.shape[-1])
    return values.expand(*lead, values.shape[-1])
