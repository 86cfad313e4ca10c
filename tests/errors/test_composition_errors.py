"""Setups that cannot be: a clear message before anything is computed, and model and thread as they were."""

import functools

import pytest
import torch
from tiny_models import METHODS, adapted, disturb, inputs, output, rows_of, run

from adapters import (
    AdapterError,
    AdapterSetup,
    Average,
    BatchSplit,
    CompositionError,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    RouterConfig,
    Split,
    Stack,
    UnknownAdapterError,
)
from adapters.context import state

TWO = MultiTask("a", "b")


@functools.cache
def model_of():
    """Bottlenecks a and b with a fusion, a LoRA c with a gate of its own, a union u, an invertible i."""
    model = adapted("bert")
    configs = {"a": "seq_bn", "b": "seq_bn", "c": "lora", "u": "mam", "e": "seq_bn", "n": "double_seq_bn"}
    for name, method in configs.items():
        model.add_adapter(name, METHODS[method])
        disturb(model, name)
    model.add_adapter("i", "seq_bn_inv[reduction_factor=4]")
    model.add_adapter("g", RouterConfig(experts=["a", "b"]))
    model.add_adapter_fusion(["a", "b"], "static")
    return model.eval()


def tasks(*values):
    return {"task_ids": torch.tensor(values)}


FORWARDS = {
    "batch split of another size": (BatchSplit("a", "b", batch_sizes=[1, 2]), {}, "sizes sum to 3, the batch has 4"),
    "batch split in a batch split": (
        BatchSplit(BatchSplit("a", "b", batch_sizes=1), "b", batch_sizes=[3, 1]),
        {},
        "sizes sum to 2, the batch has 3 rows",
    ),
    "batch split below parallel": (
        Stack(BatchSplit("a", "b", batch_sizes=2), Parallel("a", "b")),
        {},
        "sizes sum to 4, the batch has 8 rows",
    ),
    "names that are too few": (None, {"adapter_names": ["a", "b"]}, "2 entries, the batch has 4 rows"),
    "no names": (None, {"adapter_names": []}, "0 entries, the batch has 4 rows"),
    "no such name in a row": (None, {"adapter_names": ["a", "zz", None, "a"]}, "no adapter named 'zz'"),
    "no such name": ("zz", {}, "no adapter named 'zz'; it has 'a'.*Add it with"),
    "parallel in a row": (None, {"adapter_names": [Parallel("a", "b"), *"aba"]}, "cannot nest Parallel in Rows"),
    "parallel deep in a row": (None, {"adapter_names": [Stack("c", Parallel("a", "b")), *"aba"]}, "a row is no batch"),
    "names of another kind": (None, {"adapter_names": {"a": 1}}, "a setup is an adapter name"),
    "tasks missing": (TWO, {}, "has no task_ids"),
    "tasks too few": (TWO, tasks(0, 1), "task_ids: it has 2 entries, the batch has 4 rows"),
    "task too large": (TWO, tasks(0, 1, 2, 0), "has 2 children; give each row one number from 0 to 1"),
    "task negative": (TWO, tasks(0, 1, -1, 0), "from 0 to 1"),
    "tasks as floats": (TWO, tasks(0.0, 1.0, 0.0, 1.0), "must be whole numbers"),
    "tasks in two dimensions": (TWO, tasks([0, 1, 0, 1]), "must be whole numbers, one for each row"),
    "unknown task": (TWO, {"task_ids": ["a", "b", "c", "a"]}, r"'c' is no child of MultiTask\[a, b\]"),
    "fusion that is not added": (Fuse("a", "e"), {}, "no fusion named 'a,e'.*Add it with add_adapter_fusion"),
    "fusion of loras": (Fuse("c", "c"), {}, "AdapterFusion works on bottleneck adapters"),
    "gate of others": (Route("a", "c", gate="g"), {}, "'c' is none of them"),
}


@pytest.mark.parametrize(("setup", "arguments", "message"), FORWARDS.values(), ids=FORWARDS)
def test_a_refused_pass_computes_nothing(setup, arguments, message: str) -> None:
    model, batch, calls = model_of(), inputs("bert"), []
    handle = model.embeddings.register_forward_pre_hook(lambda *_: calls.append(1))
    before = run(model, batch, "a")
    calls.clear()
    try:
        with pytest.raises((AdapterError, TypeError), match=f"(?s){message}"):
            run(model, batch, setup, **arguments)
        assert not calls
    finally:
        handle.remove()
    assert (state.forward, state.setups, state.generating) == (None, (), None)
    assert model.active_adapters is None
    assert torch.equal(run(model, batch, "a"), before)


@pytest.mark.parametrize("splits", [[3, 9], [1, 2]], ids=["past the end", "too short"])
def test_splits_that_are_not_the_sequence(splits: list[int]) -> None:
    with pytest.raises(CompositionError, match=f"sizes sum to {sum(splits)}, the sequence has 6 positions"):
        run(model_of(), inputs("bert"), Split("a", "b", splits=splits))
    assert (state.forward, state.setups) == (None, ())


def train_fusion(setup):
    return lambda model: model.train_adapter_fusion(setup)


ACTIVATIONS = {
    "unknown": (lambda m: m.set_active_adapters(Stack("a", "zz")), UnknownAdapterError, "No adapter with name 'zz'"),
    "no setup": (lambda m: m.set_active_adapters(3), TypeError, "a setup is an adapter name"),
    "channels": (
        lambda m: m.set_active_adapters(Stack(Parallel("a", "b"), Parallel("a", "b", "e"))),
        CompositionError,
        "have 2 and 3 children",
    ),
    "too deep": (
        lambda m: m.set_active_adapters(Stack(Parallel(BatchSplit("a", "b", batch_sizes=2), "e"))),
        CompositionError,
        "too deep",
    ),
    "nesting": (lambda m: m.set_active_adapters(Fuse(Parallel("a", "b"), "e")), CompositionError, "cannot nest"),
    "fusion": (lambda m: m.set_active_adapters(Stack("e", Fuse("a", "e"))), CompositionError, "no fusion named 'a,e'"),
    "layers as a number": (lambda m: m.set_active_adapters("a", skip_layers=0), AdapterError, "list of whole numbers"),
    "no such layer": (lambda m: m.set_active_adapters("a", skip_layers=[2]), AdapterError, "has no layer 2"),
    "fusion of a union": (
        lambda m: m.add_adapter_fusion(["a", "u"]),
        CompositionError,
        "at .*prefix_tuning sits another part of 'u'",
    ),
    "fusion of a lora": (
        lambda m: m.add_adapter_fusion(["a", "c"]),
        CompositionError,
        "sits another part of 'c'.*use Average",
    ),
    "fusion of other places": (lambda m: m.add_adapter_fusion(["a", "n"]), CompositionError, "attention_adapters only"),
    "another fusion in its place": (
        lambda m: m.add_adapter_fusion(["a", "c"], name="a,b", overwrite_ok=True),
        CompositionError,
        "use Average",
    ),
    "fusion of an unknown field": (
        lambda m: m.add_adapter_fusion("a,b", {"kiy": True}, overwrite_ok=True),
        AdapterError,
        "are missing; they have no default",
    ),
    "fusion training without a fusion": (train_fusion("a"), CompositionError, "it has no Fuse block"),
    "fusion training of an unknown one": (train_fusion(Fuse("a", "e")), CompositionError, "no fusion named"),
}


@pytest.mark.parametrize(("call", "error", "message"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_refused_setup_changes_nothing(call, error: type[Exception], message: str) -> None:
    model = model_of()
    model.set_active_adapters(Fuse("a", "b"))

    def facts():
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return (
            model.active_adapters,
            dict(model.adapters_config.fusions),
            [*model.state_dict()],
            trained,
            model.training,
        )

    before, expected = facts(), output(model, inputs("bert"))
    try:
        with pytest.raises(error, match=f"(?s){message}"):
            call(model)
        assert facts() == before
        assert torch.equal(output(model, inputs("bert")), expected)
    finally:
        model.set_active_adapters(None)


def test_contexts_end_with_their_block_whatever_happens() -> None:
    model, batch = model_of(), inputs("bert")
    outer = AdapterSetup("a")
    with outer:
        for inner in ("zz", BatchSplit("a", "b", batch_sizes=1)):
            with pytest.raises(AdapterError), AdapterSetup(inner):
                output(model, batch)
            assert AdapterSetup.get_contexts() == [outer]
        with pytest.raises(KeyboardInterrupt), AdapterSetup("b"):
            raise KeyboardInterrupt
        with pytest.raises(ValueError, match="input_ids"):
            model(adapter_names="b")
        assert AdapterSetup.get_contexts() == [outer]
        with outer:  # one object may be opened twice
            assert len(AdapterSetup.get_contexts()) == 2
        inside = output(model, batch)
    assert AdapterSetup.get_contexts() == []
    assert torch.equal(inside, run(model, batch, "a"))
    with pytest.raises(CompositionError, match="cannot nest"):
        AdapterSetup(Stack("a", Stack("b")))


def test_empty_blocks_are_no_setup_and_single_ones_their_child() -> None:
    model, batch = model_of(), inputs("bert")
    base, alone = run(model, batch, None), run(model, batch, "c")
    for empty in (Stack(), Parallel(), Average(), MultiTask(), BatchSplit(batch_sizes=[]), Stack(None)):
        assert torch.equal(run(model, batch, empty), base)
    for single in (Parallel("c"), Average("c"), BatchSplit("c", batch_sizes=4), Split("c", splits=6)):
        torch.testing.assert_close(run(model, batch, single), alone, rtol=1e-5, atol=1e-6)
    one = rows_of(batch, [0])
    torch.testing.assert_close(run(model, one, None, adapter_names=["c"]), alone[:1], rtol=1e-5, atol=1e-6)


def test_what_was_deleted_from_an_active_setup_changes_nothing_any_more() -> None:
    for setup in (
        Stack("lora", "x"),
        Average("lora", "x"),
        Parallel("lora", "x"),
        BatchSplit("lora", "x", batch_sizes=2),
        Fuse("seq_bn", "x"),
        Route("lora", "x", gate="g"),
    ):
        model, batch = adapted("bert", "lora", "seq_bn"), inputs("bert")
        model.add_adapter("x", METHODS["seq_bn" if isinstance(setup, Fuse) else "lora"])
        disturb(model, "x")
        if isinstance(setup, Route):
            model.add_adapter("g", RouterConfig(experts=["lora", "x"]))
        if isinstance(setup, Fuse):
            model.add_adapter_fusion(setup, "static")
        model.set_active_adapters(setup)
        model.delete_adapter("x")
        found = output(model, batch)
        without = setup.with_children([setup[0], None])
        if isinstance(setup, Route):
            without = Average("lora", None)  # what a new gate is
        torch.testing.assert_close(found, run(model, batch, without), rtol=1e-4, atol=1e-5)
