"""Composition blocks as values: equality, hash, text, dictionaries, parsing."""

import copy
import pickle

import pytest

from adapters import (
    Average,
    BatchSplit,
    CompositionError,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    Split,
    Stack,
    parse_composition,
    validate_composition,
)
from adapters.composition import ALLOWED_NESTINGS, Block, parse_heads_from_composition

BLOCKS = [
    Stack("a"),
    Stack("a", "b"),
    Stack("a", Fuse("b", "c")),
    Stack("a", Fuse("b", "c", name="f")),
    Fuse("a", "b"),
    Split("a", "b", splits=[1, 2]),
    Split("a", "b", splits=[2, 1]),
    Split("a", "b", splits=[2, None]),
    BatchSplit("a", None, batch_sizes=[1, 2]),
    BatchSplit(Stack("a", "b"), "c", batch_sizes=2),
    Parallel("a", Stack("b", "c"), None),
    Average("a", "b"),
    Average("a", "b", weights=[3, 1]),
    Average("a", "b", weights=[3, 1], normalize_weights=False),
    MultiTask("a", "b"),
]
each_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block.to_dict()))


@each_block
def test_blocks_are_values(block: Block) -> None:
    others = [other for other in BLOCKS if other is not block]
    assert all(block != other for other in others)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), Block.from_dict(block.to_dict())):
        assert twin == block
        assert hash(twin) == hash(block)
        assert repr(twin) == repr(block)
        assert twin.to_dict() == block.to_dict()
    assert block != "a"
    assert len({*BLOCKS}) == len(BLOCKS)


@each_block
def test_blocks_are_frozen(block: Block) -> None:
    with pytest.raises(AttributeError, match="blocks are immutable"):
        block.children = ()


def test_text_and_dictionaries() -> None:
    block = Stack("a", Split("b", None, splits=2))
    assert repr(block) == "Stack[a, Split[b, None]]"
    single = {"type": "single", "children": ["a"]}
    nested = [{"type": "single", "children": ["b"]}, {"type": "single", "children": [None]}]
    assert block.to_dict() == {
        "type": "Stack",
        "children": [single, {"type": "Split", "children": nested, "kwargs": {"splits": [2, 2]}}],
    }
    assert Average("a", "b", weights=[3, 1]).to_dict()["kwargs"] == {"weights": [0.75, 0.25]}
    assert "kwargs" not in Fuse("a", "b").to_dict()
    assert Fuse("a", "b", name="f").to_dict()["kwargs"] == {"name": "f"}
    with pytest.raises(CompositionError, match="no block is named 'Heap'"):
        Block.from_dict({"type": "Heap", "children": []})


def test_a_block_is_a_sequence() -> None:
    block = Stack("a", Fuse("b", "c"), "b")
    assert (len(block), block[0], block[1], block[-1]) == (3, "a", Fuse("b", "c"), "b")
    assert list(block) == ["a", Fuse("b", "c"), "b"]
    assert "a" in block and "c" not in block
    assert block.flatten() == {"a", "b", "c"}
    assert (block.first(), block.last()) == ("a", "b")
    assert Fuse("a", Stack("b", "c")).name == "a,c"
    assert Stack(Parallel("a", "b", "c"), "d").parallel_channels == 3


def test_parsing() -> None:
    assert parse_composition("a") == Stack("a")
    assert parse_composition(Fuse("a", "b")) == Fuse("a", "b")
    assert parse_composition(None) is parse_composition([]) is None
    with pytest.warns(FutureWarning, match="deprecated"):
        assert parse_composition(["a", "b"]) == Stack("a", "b")
    with pytest.warns(FutureWarning, match="deprecated"):
        assert parse_composition(["a", ["b", "c"]]) == Stack("a", Fuse("b", "c"))
    with pytest.raises(TypeError, match="a setup is an adapter name"):
        parse_composition(3)


def build(kind: type[Block], *children) -> Block:
    sizes = {Split: {"splits": 1}, BatchSplit: {"batch_sizes": 1}, Route: {"gate": "g"}}
    return kind(*children, **sizes.get(kind, {}))


@pytest.mark.parametrize("outer", ALLOWED_NESTINGS)
@pytest.mark.parametrize("inner", ALLOWED_NESTINGS)
def test_the_table_of_nestings_decides(outer: type[Block], inner: type[Block]) -> None:
    block = build(outer, build(inner, "a", "b"), "c")
    if inner in ALLOWED_NESTINGS[outer]:
        validate_composition(block)
        assert parse_composition(block) is block
    else:
        with pytest.raises(CompositionError, match=f"cannot nest {inner.__name__} in {outer.__name__}"):
            validate_composition(block)


def test_depth() -> None:
    validate_composition(Stack(Parallel(Stack("a", "b"), "c")))
    with pytest.raises(CompositionError, match="too deep"):
        validate_composition(Stack(Parallel(BatchSplit("a", "b", batch_sizes=1), "c")))


def test_heads_of_a_setup() -> None:
    assert parse_heads_from_composition(Stack("a", "b")) == "b"
    assert parse_heads_from_composition(Stack("a", "b"), ["a"]) is None
    assert parse_heads_from_composition(Stack("a", Parallel("b", Stack("c", "d")))) == ["b", "d"]
    split = BatchSplit("a", Stack("b", "c"), batch_sizes=[1, 2])
    assert parse_heads_from_composition(split, ["a", "c"]) == BatchSplit("a", "c", batch_sizes=[1, 2])
    with pytest.raises(CompositionError, match="missing at least one head"):
        parse_heads_from_composition(split, ["a"])
    assert parse_heads_from_composition(Fuse("a", "b")) is None
