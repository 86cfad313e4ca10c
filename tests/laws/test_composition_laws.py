"""The laws of composition: methods × architectures × blocks."""

import pytest
import torch
from tiny_models import (
    BOTTLENECKS,
    CONFIGS,
    ENCODER_DECODERS,
    GATED,
    METHODS,
    adapted,
    disturb,
    inputs,
    output,
    plain,
    positions,
    rows_of,
    run,
    shared,
)

import adapters
from adapters import AdapterSetup, Average, BatchSplit, CompositionError, Fuse, MultiTask, Parallel, Split, Stack
from adapters.methods.fusion import StaticAdapterFusionConfig

each_model = pytest.mark.parametrize("name", CONFIGS)
each_method = pytest.mark.parametrize("method", METHODS)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def children(method: str) -> list:
    """A name, nested blocks, an adapter that is missing at some sites, and the unadapted model."""
    a, b, partial = (f"{method}_{suffix}" for suffix in ("a", "b", "partial"))
    return [a, Stack(a, b), Average(a, partial, weights=[0.3, 0.7]), partial, None]


@each_model
@each_method
def test_an_adapter_acts_and_no_setup_is_the_base_model(name: str, method: str) -> None:
    model, batch = shared(name), inputs(name)
    base = output(plain(name), batch)
    assert torch.equal(output(model, batch), base)
    assert torch.equal(run(model, batch, None), base)
    first, second = run(model, batch, f"{method}_a"), run(model, batch, f"{method}_b")
    assert (first - base).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


@each_model
@each_method
def test_batch_split_is_separate_runs(name: str, method: str) -> None:
    model = shared(name)
    batch = inputs(name, rows=6)
    sizes, parts = [1, 2, 1, 0, 2], children(method)
    expected, start = [], 0
    for child, size in zip(parts, sizes, strict=True):
        if size:
            expected.append(run(model, rows_of(batch, slice(start, start + size)), child))
        start += size
    close(run(model, batch, BatchSplit(*parts, batch_sizes=sizes)), torch.cat(expected))


@each_model
@each_method
def test_parallel_is_stacked_separate_runs(name: str, method: str) -> None:
    model, batch = shared(name), inputs(name)
    expected = torch.cat([run(model, batch, child) for child in children(method)])
    close(run(model, batch, Parallel(*children(method))), expected)


@each_model
@pytest.mark.parametrize("method", ["lora", "seq_bn", "prefix_tuning"])
def test_parallel_computes_the_blocks_below_its_adapters_once(name: str, method: str) -> None:
    """Where no block reports its own outputs and no cache is written."""
    model, batch = shared(name), inputs(name)
    setup, rows, blocks = Parallel(f"{method}_partial", f"{method}_partial"), [], model.adapter_sites.anatomy.blocks
    if name in ("gpt2", "llama", "mistral", "t5", "bart"):
        batch = {**batch, "use_cache": False}
    run(model, batch, setup)  # hooks of the library come before those below
    handles = [
        block.module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]))) for block in blocks
    ]
    found, calls = run(model, batch, setup), list(rows)
    rows.clear()
    run(model, batch, setup, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    size = len(next(iter(inputs(name).values())))
    shared_blocks = 0 if name == "albert" else 1
    assert calls == [size] * shared_blocks + [2 * size] * (len(calls) - shared_blocks)
    assert set(rows) == {2 * size}
    close(found, run(model, batch, f"{method}_partial").repeat(2, 1, 1))


@each_model
@each_method
def test_multitask_is_per_row(name: str, method: str) -> None:
    model, batch = shared(name), inputs(name)
    parts, tasks = children(method), [4, 0, 2, 0]
    expected = torch.cat([run(model, rows_of(batch, [row]), parts[task]) for row, task in enumerate(tasks)])
    close(run(model, batch, MultiTask(*parts), task_ids=torch.tensor(tasks)), expected)


@each_model
@each_method
def test_a_setup_for_each_row(name: str, method: str) -> None:
    """Adapters of one shape are computed in one call, the rest one after the other."""
    model, batch, a, b = shared(name), inputs(name), f"{method}_a", f"{method}_b"
    for names in ([a, b, None, a], [b, a, b, a], children(method)[:4], [f"{method}_partial", "__base__", b, "lora_a"]):
        parts = [None if part == "__base__" else part for part in names]
        expected = torch.cat([run(model, rows_of(batch, [row]), part) for row, part in enumerate(parts)])
        close(run(model, batch, None, adapter_names=names), expected)
    close(run(model, batch, None, adapter_names=Stack(a, b)), run(model, batch, Stack(a, b)))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@each_method
def test_gradients_of_a_mixed_batch_are_the_sum_of_separate_ones(name: str, method: str) -> None:
    model, batch, names = shared(name), inputs(name), [f"{method}_a", None, f"{method}_b", f"{method}_a"]
    parameters = [
        p for child in names[:1] + names[2:3] for module in model._modules_of(child) for p in module.parameters()
    ]
    states = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    separate = [torch.zeros_like(parameter) for parameter in parameters]
    for row, child in enumerate(names):
        if child is not None:
            with AdapterSetup(child):
                found = gradients(model(**rows_of(batch, [row]))[0])
            separate = [total + gradient for total, gradient in zip(separate, found, strict=True)]
    for got, expected in zip(gradients(model(**batch, adapter_names=names)[0]), separate, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    for parameter, state in zip(parameters, states, strict=True):
        parameter.requires_grad_(state)


@each_model
@each_method
def test_the_average_of_equals_is_each(name: str, method: str) -> None:
    model, batch, a, b = shared(name), inputs(name), f"{method}_a", f"{method}_b"
    alone = run(model, batch, a)
    close(run(model, batch, Average(a, a)), alone)
    close(run(model, batch, Average(a, b, weights=[1, 0])), alone)
    close(run(model, batch, Average(a, a, a, weights=[0.5, 0.2, 0.3])), alone)


@each_model
@pytest.mark.parametrize("method", [method for method in METHODS if method not in GATED])
def test_the_split_of_equals_is_each(name: str, method: str) -> None:
    """Gated methods are no case of it: their gate is a mean over the positions that they see."""
    model, batch, a = shared(name), inputs(name), f"{method}_a"
    length = positions(name)
    close(run(model, batch, Split(a, a, splits=[2, length - 2])), run(model, batch, a))
    close(run(model, batch, Split(a, f"{method}_b", splits=[length, 0])), run(model, batch, a))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("method", [method for method in METHODS if method not in GATED])
def test_a_split_with_a_rest_fits_two_lengths(name: str, method: str) -> None:
    """A decoder that looks back only computes for a prefix of its input what it computes for all of it."""
    model, batch, a, b = shared(name), inputs(name), f"{method}_a", f"{method}_b"
    short = batch | {key: batch[key][:, :3] for key in ("decoder_input_ids", "decoder_attention_mask")}
    with pytest.raises(CompositionError, match=r"sizes sum to 6, the sequence has 3 positions.* give one child None"):
        run(model, short, Split(a, b, splits=[4, 2]))
    close(run(model, short, Split(a, b, splits=[2, None])), run(model, batch, Split(a, b, splits=[2, 4]))[:, :3])
    close(run(model, short, Split(a, b, splits=[4, None])), run(model, batch, Split(a, b, splits=[4, 2]))[:, :3])
    for splits in ([1, None], [None, 5], [None, 9], [0, None]):
        close(run(model, short, Split(a, a, splits=splits)), run(model, short, a))


@each_model
@pytest.mark.parametrize("method", METHODS)
def test_an_unadapted_child_leaves_what_it_gets(name: str, method: str) -> None:
    model, batch, a = shared(name), inputs(name), f"{method}_a"
    alone, base = run(model, batch, a), run(model, batch, None)
    close(run(model, batch, Stack(a, None)), alone)
    close(run(model, batch, Average(a, None, weights=[0, 1])), base)
    close(run(model, batch, Split(None, None, splits=[1, positions(name) - 1])), base)


@each_model
def test_methods_and_lengths_of_prefixes_mix_in_one_batch(name: str) -> None:
    model, batch = shared(name), inputs(name, rows=len(METHODS))
    names = [f"{method}_a" for method in METHODS]
    expected = torch.cat([run(model, rows_of(batch, [row]), child) for row, child in enumerate(names)])
    close(run(model, batch, BatchSplit(*names, batch_sizes=1)), expected)
    tasks = torch.arange(len(names)).flip(0)
    expected = torch.cat([run(model, rows_of(batch, [row]), names[task]) for row, task in enumerate(tasks)])
    close(run(model, batch, MultiTask(*names), task_ids=tasks), expected)
    some = rows_of(batch, slice(0, 2))
    close(run(model, some, Parallel(*names)), torch.cat([run(model, some, child) for child in names]))


@each_model
@each_method
def test_blocks_nest_in_a_stack(name: str, method: str) -> None:
    model, batch, a, b = shared(name), inputs(name), f"{method}_a", f"{method}_b"
    parts = [run(model, rows_of(batch, slice(0, 1)), Stack(b, a)), run(model, rows_of(batch, slice(1, 4)), b)]
    close(run(model, batch, Stack(b, BatchSplit(a, None, batch_sizes=[1, 3]))), torch.cat(parts))
    parts = [run(model, batch, Stack(b, child)) for child in (a, b)]
    close(run(model, batch, Stack(b, Parallel(a, b))), torch.cat(parts))
    close(run(model, batch, Stack(b, Average(a, a))), run(model, batch, Stack(b, a)))


@each_model
@each_method
def test_a_split_nests_in_a_batch_split(name: str, method: str) -> None:
    model, batch, a, b = shared(name), inputs(name), f"{method}_a", f"{method}_b"
    split = Split(a, b, splits=[2, positions(name) - 2])
    parts = [run(model, rows_of(batch, slice(0, 2)), a), run(model, rows_of(batch, slice(2, 4)), split)]
    close(run(model, batch, BatchSplit(a, split, batch_sizes=[2, 2])), torch.cat(parts))


@each_model
@pytest.mark.parametrize("method", BOTTLENECKS)
def test_a_uniform_fusion_is_the_average(name: str, method: str) -> None:
    model, batch = adapted(name), inputs(name)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, METHODS[method])
        disturb(model, adapter)
    fuse = Fuse("a", "b")
    model.add_adapter_fusion(fuse, StaticAdapterFusionConfig(query=True, key=True))
    for layer in model.adapter_sites.fusion_layers():
        torch.nn.init.zeros_(layer.query.weight)
    mean = run(model, batch, Average("a", "b"))
    close(run(model, batch, fuse), mean)
    close(run(model, batch, MultiTask(fuse, "a"), task_ids=torch.tensor([0, 1, 0, 1]))[::2], mean[::2])
    for layer in model.adapter_sites.fusion_layers():
        torch.nn.init.normal_(layer.query.weight)
        torch.nn.init.normal_(layer.key.weight)
    stacked = run(model, batch, Stack("a", fuse))
    assert (stacked - mean).abs().max() > 1e-4


def snapshot(model: torch.nn.Module) -> tuple:
    """All of a model that adding an adapter touches."""
    hooks = [
        (path, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for path, module in model.named_modules()
    ]
    configs = {path: id(module.config) for path, module in model.named_modules() if hasattr(module, "config")}
    classes = {path: type(module) for path, module in model.named_modules()}
    return list(model.state_dict()), hooks, configs, classes, model.config.to_dict(), vars(model).keys()


@each_model
@each_method
def test_add_and_delete_leave_no_trace(name: str, method: str) -> None:
    model, batch = plain(name), inputs(name)
    base, config, names = output(model, batch), model.config.to_dict(), list(model.state_dict())
    adapters.init(model)
    before = snapshot(model)
    assert torch.equal(output(model, batch), base)
    model.add_adapter("x", METHODS[method], set_active=True)
    disturb(model, "x")
    assert not torch.equal(output(model, batch), base)
    model.set_active_adapters(None)
    assert torch.equal(output(model, batch), base)
    model.set_active_adapters("x")
    with AdapterSetup(None):
        assert torch.equal(output(model, batch), base)
    model.delete_adapter("x")
    assert model.active_adapters is None
    assert snapshot(model) == before
    assert (model.config.to_dict(), list(model.state_dict())) == (config, names)
    assert torch.equal(output(model, batch), base)


@each_model
def test_a_fusion_leaves_no_trace(name: str) -> None:
    model = adapted(name, "seq_bn", "adapter_plus")
    before = snapshot(model)
    model.add_adapter_fusion(["seq_bn", "adapter_plus"], set_active=True)
    assert snapshot(model) != before
    model.delete_adapter_fusion("seq_bn,adapter_plus")
    assert snapshot(model) == before
    assert model.active_adapters is None


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("method", METHODS)
def test_batches_of_unequal_lengths_compose(name: str, method: str) -> None:
    """The decoder's sequences may have another length than the encoder's."""
    model, batch, a = shared(name), inputs(name), f"{method}_a"
    batch = {key: value[:, :4] if key.startswith("decoder") else value for key, value in batch.items()}
    setup = BatchSplit(a, f"{method}_b", batch_sizes=[1, 3])
    parts = [run(model, rows_of(batch, slice(0, 1)), a), run(model, rows_of(batch, slice(1, 4)), f"{method}_b")]
    close(run(model, batch, setup), torch.cat(parts))
