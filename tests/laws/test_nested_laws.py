"""Each nesting that the table allows is, for each row and channel, the setup that concerns it; trained, compiled."""

import copy
import functools
from itertools import cycle
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, LENGTH, ROWS, adapted, disturb, inputs, positions, rows_of, run

from adapters import AdapterSetup, Average, BatchSplit, Fuse, MultiTask, Parallel, Route, RouterConfig, Split, Stack
from adapters.composition import ALLOWED_NESTINGS, Block, Rows, Setup

BOTTLENECKS = ("seq_bn", "par_bn", "adapter_plus")
OTHERS = [("lora", "seq_bn", "prefix_tuning"), ("par_bn", "lora", "ia3"), ("prefix_tuning", "adapter_plus", "lora")]
EXPERTS = ("lora", "ia3", "prefix_tuning", *BOTTLENECKS)
TASKS = (1, 0, 1, 0)
NESTINGS = [(outer, inner) for outer, allowed in ALLOWED_NESTINGS.items() for inner in allowed if inner is not str]
CASES = [
    pytest.param(outer, inner, name, names, id=f"{inner.__name__}_in_{outer.__name__}-{name}")
    for (outer, inner), name, names in zip(NESTINGS, cycle(CONFIGS), cycle(OTHERS))
]
each_nesting = pytest.mark.parametrize(("outer", "inner", "name", "names"), CASES)


@functools.cache
def model_of(name: str):
    """One adapter of each kind, a gate over all of them, and fusions of the bottlenecks."""
    model = adapted(name, *EXPERTS)
    model.add_adapter("gate", RouterConfig(experts=list(EXPERTS)))
    disturb(model, "gate")
    for names in (("seq_bn", "par_bn"), ("par_bn", "adapter_plus"), ("adapter_plus", "seq_bn")):
        model.add_adapter_fusion(list(names), "static")
    return model.eval()


def build(kind: type[Block], children: list[Setup], length: int, rows: int) -> Block:
    """A block of two children for so many positions and rows."""
    arguments: dict[type[Block], dict[str, Any]] = {
        Split: {"splits": [length // 2, length - length // 2]},
        BatchSplit: {"batch_sizes": [rows // 2, rows - rows // 2]},
        Route: {"gate": "gate"},
    }
    return kind(*children, **arguments.get(kind, {}))


def nested(outer: type[Block], inner: type[Block], names: tuple[str, ...], length: int) -> Block:
    a, b, c = BOTTLENECKS if Fuse in (outer, inner) else names
    length_inside = length // 2 if outer is Split else length
    rows_inside = ROWS // 2 if outer is BatchSplit else ROWS
    return build(outer, [build(inner, [a, b], length_inside, rows_inside), c], length, ROWS)


def of_channel(tree: Setup, channel: int) -> Setup:
    """The setup of one channel."""
    if isinstance(tree, Parallel):
        return tree[channel]
    if not isinstance(tree, Block):
        return tree
    return joined(tree, [of_channel(child, channel) for child in tree])


def of_row(tree: Setup, row: int, number: int) -> Setup:
    """The setup of one row: `row` is its place among those that reach the tree, `number` that in the batch."""
    if isinstance(tree, BatchSplit):
        for child, size in zip(tree, tree.batch_sizes, strict=True):
            if row < size:
                return of_row(child, row, number)
            row -= size
    if isinstance(tree, MultiTask):
        return of_row(tree[TASKS[number]], row, number)
    if not isinstance(tree, Block):
        return tree
    return joined(tree, [of_row(child, row, number) for child in tree])


def joined(tree: Block, children: list[Setup]) -> Block:
    """The block with other children; stacks within a stack are one."""
    if isinstance(tree, Stack):
        return Stack(*(part for child in children for part in (child if isinstance(child, Stack) else [child])))
    return tree.with_children(children)


def arguments(setup: Block) -> dict[str, Any]:
    """What the forward call needs beside the inputs."""
    if isinstance(setup, Rows):
        names = {"adapter_names": [setup[task] for task in TASKS]}
        return names | ({"task_ids": torch.tensor(TASKS)} if MultiTask in map(type, setup) else {})
    return {"task_ids": torch.tensor(TASKS)} if any(isinstance(b, MultiTask) for b in setup.blocks()) else {}


def apart(name: str, setup: Block) -> list[tuple[list[int], Setup]]:
    """The rows of the result, each with its input row and its own setup."""
    return [
        ([row], of_row(of_channel(setup, channel), row, row))
        for channel in range(setup.parallel_channels)
        for row in range(ROWS)
    ]


@each_nesting
def test_every_nesting_is_its_rows(outer, inner, name: str, names: tuple[str, ...]) -> None:
    model, batch, setup = model_of(name), inputs(name), nested(outer, inner, names, positions(name))
    found = run(model, batch, None if isinstance(setup, Rows) else setup, **arguments(setup))
    expected = [run(model, rows_of(batch, rows), child) for rows, child in apart(name, setup)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=2e-5)
    assert (found[:ROWS] - run(model, batch, None)).abs().max() > 1e-3


def loss_of(model, batch, setup: Setup, **more: Any) -> torch.Tensor:
    torch.manual_seed(3)
    with AdapterSetup(setup):
        return model(**batch, **more)[0].pow(3).sum()


def gradients(model, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def trained(name: str):
    """A copy whose adapters, gate and fusions are trained."""
    model = copy.deepcopy(model_of(name))
    model.train_adapter(Parallel(*EXPERTS, "gate"))
    model.set_active_adapters(None)
    for layer in model.adapter_sites.fusion_layers():
        layer.requires_grad_(True)
    return model


@each_nesting
def test_gradients_of_a_batch_are_the_sum_of_those_of_its_rows(outer, inner, name, names) -> None:
    model, batch, setup = trained(name).eval(), inputs(name), nested(outer, inner, names, positions(name))
    given = None if isinstance(setup, Rows) else setup
    found = gradients(model, [loss_of(model, batch, given, **arguments(setup))])
    losses = [loss_of(model, rows_of(batch, rows), child) for rows, child in apart(name, setup)]
    expected = gradients(model, losses)
    assert found
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * max(1.0, scale), msg=key)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize(("outer", "inner", "name", "names"), [case for case in CASES if "albert" not in case.id][::2])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
def test_checkpointing_changes_no_gradient_of_a_nesting(outer, inner, name, names, reentrant: bool) -> None:
    model, batch, setup = trained(name), inputs(name), nested(outer, inner, names, positions(name))
    given = None if isinstance(setup, Rows) else setup
    expected = gradients(model, [loss_of(model, batch, given, **arguments(setup))])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, [loss_of(model, batch, given, **arguments(setup))])
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * max(1.0, scale), msg=key)


COMPILED = [(Stack, Fuse), (MultiTask, Average), (Rows, Fuse), (Split, Route)]


@pytest.mark.parametrize(("outer", "inner"), COMPILED, ids=lambda kind: kind.__name__)
def test_nestings_compile_whole(outer, inner) -> None:
    torch._dynamo.reset()
    model, batch, setup = model_of("bert"), inputs("bert"), nested(outer, inner, OTHERS[0], LENGTH)
    given = None if isinstance(setup, Rows) else setup
    expected = run(model, batch, given, **arguments(setup))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, batch, given, **arguments(setup)), expected, rtol=1e-4, atol=2e-5)
