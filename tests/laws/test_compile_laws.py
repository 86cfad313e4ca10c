"""``torch.compile``: no graph breaks, one compilation for each setup, none on the way back."""

import pytest
import torch
from tiny_models import METHODS, adapted, inputs, output

from adapters import Average, BatchSplit, Parallel, Split, Stack


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that runs the graphs as they are and counts how many it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def check(name: str, methods: list[str], setups: list) -> None:
    model, batch = adapted(name, *methods), inputs(name)
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = 0
    for setup in setups:
        model.set_active_adapters(setup)
        expected = output(model, batch)
        torch.testing.assert_close(output(compiled, batch), expected, rtol=1e-4, atol=2e-5)
        assert counter.graphs <= seen + 1, f"{setup} was compiled {counter.graphs - seen} times"
        seen = counter.graphs
    for setup in setups:
        model.set_active_adapters(setup)
        output(compiled, batch)
        assert counter.graphs == seen, f"going back to {setup} compiled it again"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_compiles_whole(method: str) -> None:
    check("bert", [method], [method])


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama", "t5", "vit"])
def test_switching_back_does_not_compile_again(name: str) -> None:
    methods = ["lora", "double_seq_bn", "prefix_tuning"]
    a, b, c = methods
    check(name, methods, [None, Stack(a, b), c])


@pytest.mark.parametrize("block", ["average", "batch_split", "parallel", "split"])
def test_blocks_compile_whole(block: str) -> None:
    methods = ["lora", "adapter_plus", "unipelt"]
    a, b, c = methods
    setup = {
        "average": Average(a, b, c),
        "batch_split": BatchSplit(a, Stack(b, c), None, batch_sizes=[1, 2, 1]),
        "parallel": Parallel(a, Stack(b, c), None),
        "split": Split(a, b, splits=[2, 4]),
    }[block]
    check("llama", methods, [setup])


def test_gradients_of_a_compiled_model() -> None:
    model, batch = adapted("bert", "lora", "double_seq_bn"), inputs("bert")
    model.train_adapter(Stack("lora", "double_seq_bn"))
    model.eval()

    def gradients(run) -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(**batch)[0].pow(3).sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model)
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4, msg=key)
