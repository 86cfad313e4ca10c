"""Many adapters of one shape in one call: their parameters are stacked, each row of the batch uses its own.

Without it a batch that is shared by n adapters costs n small calls at every site; with it the cost hardly depends on n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .composition import Block
from .derived import Derived
from .signals import Signal

if TYPE_CHECKING:
    from .method import AdapterModule

S = TypeVar("S", bound=Signal)
GROUPS = 64
"""Of so many blocks the groups are kept at a site."""
ROWS_PER_MODULE = 4
"""Up to so many rows for each adapter, a copy of its parameters for each row is faster than a call for each adapter."""


class Group:
    """The modules of one site that the children of a block name, in their order; None is an unadapted child."""

    def __init__(self, children: Sequence[AdapterModule[Any] | None]) -> None:
        self.modules = [module for module in children if module is not None]
        numbers = iter(range(len(self.modules)))
        self._number = [-1 if module is None else next(numbers) for module in children]
        self.complete = len(self.modules) == len(children)
        self.derived = Derived()

    @classmethod
    def of(cls, children: Sequence[AdapterModule[Any] | None]) -> Group | None:
        """The group of these, if they can be computed together and there are two or more."""
        keys = {(type(module), module.group_key()) for module in children if module is not None}
        count = sum(module is not None for module in children)
        return cls(children) if count > 1 and len(keys) == 1 and next(iter(keys))[1] is not None else None

    @classmethod
    def of_children(cls, tree: Block, adapters: Mapping[str, AdapterModule[Any]]) -> Group | None:
        """The group of a block's children, if all are names that can be computed together."""
        if any(isinstance(child, Block) for child in tree.children):
            return None
        return cls.of([None if child is None else adapters.get(str(child)) for child in tree.children])

    def suits(self, rows: int) -> bool:
        """Whether one call for so many rows in any order is faster than a call for each adapter."""
        return rows <= ROWS_PER_MODULE * len(self.modules)

    def apply(self, signal: S, children: Sequence[int] | Tensor | None) -> S:
        """What the adapters make of the signal.

        children: for each row the number of its child; None: the rows come in equal parts, one for each child.
        """
        kind = type(self.modules[0])
        output: S
        if children is None:
            output = kind.grouped(self, signal, None)
            return output
        device = next(iter(signal.tensors().values())).device
        index = torch.as_tensor(children, device=device)
        if self.complete:
            output = kind.grouped(self, signal, index)
            return output
        index = torch.tensor(self._number, device=device)[index]
        output = kind.grouped(self, signal, index.clamp(min=0))
        return signal.select(index >= 0, output)

    def stacked(self, name: str) -> Tensor:
        """(n, …) the parameter of that name of all modules."""
        parameters: list[Tensor] = [module.get_parameter(name) for module in self.modules]
        return self.derived.get(name, parameters, lambda: torch.stack(parameters))


class Groups:
    """The groups of a site's adapters, by the blocks that name them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Block, Group | None]] = {}

    def of(self, tree: Block, adapters: Mapping[str, AdapterModule[Any]]) -> Group | None:
        """That of the children of `tree`, if they can be computed in one call."""
        if torch.compiler.is_compiling():  # a graph cannot keep a block that it made
            return Group.of_children(tree, adapters)
        known = self._known.get(id(tree))
        if known is None or known[0] is not tree:
            if len(self._known) >= GROUPS:
                self._known = {}
            known = self._known[id(tree)] = (tree, Group.of_children(tree, adapters))
        return known[1]


def grouped_linear(
    x: Tensor,
    weights: Tensor,
    index: Tensor | None,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(b, s, out) the rows x (b, s, in), each times its own of the weights (n, out, in), times `scale`.

    index: (b,) the number of each row's weight; None: the rows come in n equal parts. Added are each row's own of the
    biases (n, out), or `onto` (b, s, out).
    """
    rows, length, _ = x.shape
    if index is None:
        count = weights.shape[0]
        x = x.reshape(count, -1, x.shape[-1])
        onto = None if onto is None else onto.reshape(count, x.shape[1], -1)
    else:
        weights, bias = weights[index], None if bias is None else bias[index]
    start = onto if bias is None else bias[:, None]
    weights = weights.transpose(1, 2)
    product = torch.bmm(x, weights) if start is None else torch.baddbmm(start, x, weights, alpha=scale)
    return product.view(rows, length, -1)


def per_row(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """(b, …) for each row its own of the values (n, …)."""
    return values.repeat_interleave(rows // values.shape[0], 0) if index is None else values[index]
