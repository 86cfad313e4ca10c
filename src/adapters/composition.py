"""Composition blocks: how the adapters of a setup work together. What they mean is in ``evaluation.py``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar, overload

from .errors import CompositionError, ConfigError, listing


class Block(Sequence["Setup"]):
    """A node of a composition. Its children are adapter names, blocks, or None for the unadapted model.

    Blocks are immutable; two are equal when their types, children and parameters are.
    """

    children: tuple[Setup, ...]
    parameters: tuple[str, ...] = ()

    def __init__(self, *children: Any) -> None:
        """Take names, blocks, lists (read as a Stack) or None."""
        self._set("children", tuple(parse_composition(child, level=None) for child in children))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} = …: blocks are immutable; build a new block instead.")

    @overload
    def __getitem__(self, index: int) -> Setup: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Setup]: ...
    def __getitem__(self, index: int | slice) -> Setup | Sequence[Setup]:
        """The direct child at `index`."""
        return self.children[index]

    def __len__(self) -> int:
        """The number of direct children."""
        return len(self.children)

    def _key(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self.parameters)
        return (type(self), self.children, *(tuple(v) if isinstance(v, list) else v for v in values))

    def __eq__(self, other: object) -> bool:
        """Same type, same children, same parameters."""
        return isinstance(other, Block) and self._key() == other._key()

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self._key())

    def __repr__(self) -> str:
        """As in ``Stack[a, Fuse[b, c]]``."""
        return f"{type(self).__name__}[{', '.join(map(str, self.children))}]"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle through the constructor's result, not through the (forbidden) attribute assignment."""
        return _restore, (type(self), self.children, {name: getattr(self, name) for name in self.parameters})

    def leaves(self) -> Iterator[str]:
        """The adapter names, left to right."""
        for child in self.children:
            if isinstance(child, Block):
                yield from child.leaves()
            elif child is not None:
                yield child

    def blocks(self) -> Iterator[Block]:
        """This block and all below it, from the outside in."""
        yield self
        for child in self.children:
            if isinstance(child, Block):
                yield from child.blocks()

    def flatten(self) -> set[str]:
        """The set of adapter names."""
        return set(self.leaves())

    def first(self) -> str:
        """The first adapter name."""
        return next(self.leaves())

    def last(self) -> str:
        """The last adapter name."""
        return list(self.leaves())[-1]

    @property
    def parallel_channels(self) -> int:
        """How many copies of the batch the setup needs."""
        own = len(self.children) if isinstance(self, Parallel) else 1
        return max([own, *(child.parallel_channels for child in self.children if isinstance(child, Block))])

    def with_children(self, children: Sequence[Setup]) -> Self:
        """The same block with other children."""
        return _restore(type(self), tuple(children), {name: getattr(self, name) for name in self.parameters})

    def to_dict(self) -> dict[str, Any]:
        """The form of ``adapter_setup.json``."""
        children = [
            child.to_dict() if isinstance(child, Block) else {"type": "single", "children": [child]}
            for child in self.children
        ]
        data: dict[str, Any] = {"type": type(self).__name__, "children": children}
        kwargs = {name: getattr(self, name) for name in self.parameters}
        return data | {"kwargs": kwargs} if kwargs else data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Setup:
        """The inverse of ``to_dict``."""
        if data["type"] == "single":
            name: str | None = data["children"][0]
            return name
        block = BLOCKS.get(data["type"])
        if block is None:
            raise CompositionError(
                f"from_dict({data!r}): no block is named {data['type']!r}; known are {listing(BLOCKS)}."
            )
        kwargs = dict(data.get("kwargs", {}))
        if block is Average:
            kwargs["normalize_weights"] = False
        return block(*(cls.from_dict(child) for child in data["children"]), **kwargs)


AdapterCompositionBlock = Block
Setup = Block | str | None
B = TypeVar("B", bound=Block)


def _restore(block: type[B], children: tuple[Setup, ...], parameters: dict[str, Any]) -> B:
    new = object.__new__(block)
    for name, value in {"children": children, **parameters}.items():
        object.__setattr__(new, name, value)
    return new


class Stack(Block):
    """The children one after the other, left to right."""


class Fuse(Block):
    """AdapterFusion: attention over the children's outputs. `name` is the fusion's; by default the joined names."""

    name: str
    parameters = ("name",)

    def __init__(self, *children: Any, name: str | None = None) -> None:
        """See the class."""
        super().__init__(*children)
        default = ",".join(c.last() if isinstance(c, Block) else str(c) for c in self.children)
        self._set("name", name or default)

    def to_dict(self) -> dict[str, Any]:
        """As for any block; the name only where it is not the default, so that 1.x reads the rest."""
        data = super().to_dict()
        if self.name == Fuse(*self.children).name:
            del data["kwargs"]
        return data


class Split(Block):
    """Consecutive parts of the sequence: child i gets `splits[i]` positions, and one of None those that are left."""

    splits: list[int | None]
    parameters = ("splits",)

    def __init__(self, *children: Any, splits: int | Sequence[int | None]) -> None:
        """An int stands for that many positions for every child."""
        super().__init__(*children)
        if not isinstance(splits, int) and list(splits).count(None) > 1:
            raise CompositionError(f"Split(splits={list(splits)}): only one child can get what the others leave.")
        self._set("splits", _sizes(self, "splits", splits, rest=True))

    def sizes(self, length: int) -> list[int]:
        """The sizes in a sequence of `length` positions; with a None among the splits every length has some.

        Raises:
            CompositionError: there is no None, and the splits do not add up to `length`.
        """
        given = sum(size for size in self.splits if size is not None)
        if None not in self.splits and given != length:
            raise CompositionError(
                f"Split(splits={self.splits}): sizes sum to {given}, the sequence has {length} positions; they must be "
                "equal. Where lengths differ (encoder and decoder, say), give one child None: it gets what is left."
            )
        sizes: list[int] = []
        for size in self.splits:
            sizes.append(min(max(length - given, 0) if size is None else size, length - sum(sizes)))
        return sizes


class BatchSplit(Block):
    """Consecutive parts of the batch: child i gets `batch_sizes[i]` rows."""

    batch_sizes: list[int]
    parameters = ("batch_sizes",)

    def __init__(self, *children: Any, batch_sizes: int | list[int]) -> None:
        """An int stands for that many rows for every child."""
        super().__init__(*children)
        self._set("batch_sizes", _sizes(self, "batch_sizes", batch_sizes))


class Parallel(Block):
    """Every child gets a copy of the whole batch; the outputs stand one after the other."""


class Average(Block):
    """The weighted mean of the children's outputs: sum_i w_i f_i(x)."""

    weights: list[float]
    parameters = ("weights",)

    def __init__(self, *children: Any, weights: list[float] | None = None, normalize_weights: bool = True) -> None:
        """Without `weights` all children count the same; `normalize_weights` makes the weights sum to 1."""
        super().__init__(*children)
        count = len(self.children)
        if weights is not None and len(weights) != count:
            raise CompositionError(
                f"Average(weights={weights}): {len(weights)} weights for {count} children; give one each."
            )
        values = [1.0 / max(count, 1)] * count if weights is None else [float(weight) for weight in weights]
        if weights is not None and normalize_weights:
            if not sum(values):
                raise CompositionError(
                    f"Average(weights={weights}): the weights sum to 0; pass normalize_weights=False."
                )
            values = [value / sum(values) for value in values]
        self._set("weights", values)


class MultiTask(Block):
    """Each row goes to the child that `task_ids` names."""


class Route(Block):
    """The children's outputs, mixed by the weights that the adapter `gate` (of a ``RouterConfig``) gives them."""

    gate: str
    parameters = ("gate",)

    def __init__(self, *children: Any, gate: str) -> None:
        """The children are experts of the gate, or stacks that end in one."""
        super().__init__(*children)
        if None in self.children:
            raise CompositionError(f"{self!r}: the children of Route are the gate's experts; name each of them.")
        self._set("gate", gate)

    def leaves(self) -> Iterator[str]:
        """The gate, and the adapter names of the children, left to right."""
        yield self.gate
        yield from super().leaves()

    def experts(self) -> list[str]:
        """The name that the gate has for each child."""
        return [child.last() if isinstance(child, Block) else str(child) for child in self.children]


class Rows(MultiTask):
    """Each row goes to the child that ``adapter_names`` of the forward call gives it; made from that argument.

    Its children may be what a whole setup may be, but for blocks that divide or repeat the batch.
    """


BLOCKS: dict[str, type[Block]] = {
    block.__name__: block for block in (Stack, Fuse, Split, Parallel, BatchSplit, Average, MultiTask, Route)
}

ALLOWED_NESTINGS: dict[type[Block], list[type]] = {
    Stack: [str, Fuse, Split, Parallel, BatchSplit, Average, MultiTask, Route],
    Fuse: [str, Stack],
    Split: [str, Split, Stack, BatchSplit, Average, Route],
    Parallel: [str, Stack, BatchSplit, Average, Route],
    BatchSplit: [str, Stack, Split, BatchSplit, Average, Route],
    Average: [str, Stack, Split, BatchSplit, Route],
    MultiTask: [str, Stack, Average, Fuse, Route],
    Route: [str, Stack],
    Rows: [str, Stack, Split, Average, Fuse, Route, MultiTask],
}


def _sizes(block: Block, name: str, sizes: int | Sequence[int | None], rest: bool = False) -> list[Any]:
    values: list[Any] = [sizes] * len(block.children) if isinstance(sizes, int) else list(sizes)
    kind = type(block).__name__
    if len(values) != len(block.children):
        raise CompositionError(
            f"{kind}({name}={values}): {len(values)} sizes for {len(block.children)} children; each needs one."
        )
    if not all((value is None and rest) or (isinstance(value, int) and value >= 0) for value in values):
        raise CompositionError(f"{kind}({name}={values}): sizes are whole numbers of at least 0.")
    return values


def validate_composition(adapter_composition: Setup, level: int = 0, model_type: str | None = None) -> None:
    """Check a setup against the table of allowed nestings.

    Raises:
        CompositionError: a block stands where it may not, or deeper than a Stack within a block; or blocks of Parallel
            disagree on the number of channels.
    """
    if level > 1 and not (adapter_composition is None or isinstance(adapter_composition, (str, Stack))):
        raise CompositionError(
            f"{adapter_composition}: the setup is too deep, {type(adapter_composition).__name__} stands at level "
            f"{level}; below the second level only names and Stack are allowed."
        )
    if isinstance(adapter_composition, Block):
        allowed = ALLOWED_NESTINGS[type(adapter_composition)]
        for child in adapter_composition.children:
            if child is not None and type(child) not in allowed:
                raise CompositionError(
                    f"{adapter_composition}: cannot nest {type(child).__name__} in "
                    f"{type(adapter_composition).__name__}; allowed there are "
                    f"{listing(kind.__name__ for kind in allowed)}."
                )
            validate_composition(child, level + (not isinstance(adapter_composition, Rows)), model_type)
        if level == 0:
            _check_channels(adapter_composition)


def _check_channels(setup: Block) -> None:
    """Refuse copies of the batch that fit no block, or a part of it only."""
    widths = sorted({len(block) for block in setup.blocks() if isinstance(block, Parallel)})
    if len(widths) > 1:
        raise CompositionError(
            f"{setup}: its blocks of Parallel have {widths[0]} and {widths[-1]} children; give all of them the same "
            "number, since channel i of one goes on in channel i of the next."
        )
    if isinstance(setup, Rows):
        for block in setup.blocks():
            if isinstance(block, (Parallel, BatchSplit)):
                raise CompositionError(
                    f"adapter_names: {block} stands in the setup of a row, and a row is no batch; name what that row "
                    "is for."
                )


@overload
def parse_composition(adapter_composition: Any, level: int = 0, model_type: str | None = None) -> Block | None: ...
@overload
def parse_composition(adapter_composition: Any, level: None, model_type: str | None = None) -> Setup: ...
def parse_composition(adapter_composition: Any, level: int | None = 0, model_type: str | None = None) -> Setup:
    """Read a setup: a name, a block, or (deprecated) nested lists, where a list within a list is a Fuse.

    Raises:
        TypeError: `adapter_composition` is none of these. CompositionError: see ``validate_composition``.
    """
    if isinstance(adapter_composition, Block) and len(adapter_composition):
        if level is not None:
            validate_composition(adapter_composition, level, model_type)
        return adapter_composition
    if not adapter_composition:
        return None
    if isinstance(adapter_composition, str):
        return Stack(adapter_composition) if level == 0 else adapter_composition
    if isinstance(adapter_composition, Sequence):
        warnings.warn(
            f"{adapter_composition!r}: activating adapters through a list is deprecated; use Stack and Fuse.",
            FutureWarning,
            stacklevel=2,
        )
        deeper: Any = None if level is None else level + 1
        block = Fuse if level == 1 else Stack
        return block(*(parse_composition(child, deeper, model_type) for child in adapter_composition))
    raise ConfigError(
        f"{adapter_composition!r}: a setup is an adapter name, a composition block or a list, not "
        f"{type(adapter_composition).__name__}."
    )


def parse_heads_from_composition(adapter_composition: Setup, reference_heads: Any = None) -> Any:
    """The heads that a setup calls for: a name, a list (Parallel), a BatchSplit of names, or None.

    Raises:
        CompositionError: a BatchSplit names an adapter for which `reference_heads` has no head.
    """
    final = adapter_composition.children[-1] if isinstance(adapter_composition, Stack) else adapter_composition
    if isinstance(final, str):
        return final if reference_heads is None or final in reference_heads else None
    if isinstance(final, Parallel):
        return [child.last() if isinstance(child, Block) else child for child in final.children]
    if isinstance(final, BatchSplit):
        names = [child.last() if isinstance(child, Block) else child for child in final.children]
        if reference_heads is not None and not all(name in reference_heads for name in names):
            raise CompositionError(
                f"{final}: missing at least one head for the given BatchSplit setup; it needs heads named "
                f"{listing(map(str, names))}, the model has {listing(reference_heads)}. Add them with "
                "add_classification_head or another add_*_head."
            )
        return BatchSplit(*names, batch_sizes=final.batch_sizes)
    return None
