"""Adapters of different methods at one module: neither the order of adding nor the block around them counts."""

import pytest
import torch
from test_composition_laws import close
from tiny_models import METHODS, MORE_METHODS, disturb, inputs, output, plain, rows_of, run

import adapters
from adapters import Average, BatchSplit, ConfigUnion, LoRAConfig, Parallel, Split, Stack, TrainableTokensConfig

ALL = {**METHODS, **MORE_METHODS}
ALL |= {"tokens": TrainableTokensConfig(token_indices=[5, 6, 7, 8]), "words": LoRAConfig(r=2, embedding_lora=True)}
each_model = pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "t5", "bart", "vit"])
AT_ONE_MODULE = [
    ("lora", "double_seq_bn"),  # the map's output is the sub-layer's
    ("ia3", "scaled_par_bn"),
    ("dora", "adapter_plus"),
    ("bitfit", "seq_bn"),
    ("oft", "par_bn"),  # the map's input is the sub-layer's
    ("boft", "double_seq_bn"),
    ("words", "seq_bn_inv"),
    ("tokens", "seq_bn_inv"),
]


def model_with(name: str, *methods: str):
    model = plain(name)
    adapters.init(model)
    for method in methods:
        torch.manual_seed(5)
        model.add_adapter(method, ALL[method])
        disturb(model, method)
    return model.eval()


@each_model
@pytest.mark.parametrize(("first", "second"), AT_ONE_MODULE)
def test_the_order_of_adding_does_not_count(name: str, first: str, second: str) -> None:
    if (first == "bitfit" and name == "t5") or (first in ("words", "tokens") and name == "vit"):
        second, first = "seq_bn", "lora"  # these have no biases, or no words
    batch, setup = inputs(name), Stack(first, second)
    ordered, reverse = model_with(name, first, second), model_with(name, second, first)
    expected = run(ordered, batch, setup)
    close(run(reverse, batch, setup), expected)
    for model in (ordered, reverse):
        close(run(model, batch, Average(setup, setup)), expected)
        close(output(model, batch, adapter_names=[setup, None, setup, first])[::2], expected[::2])


@each_model
@pytest.mark.parametrize("pair", [("oft", "par_bn"), ("boft", "scaled_par_bn"), ("oft", "seq_bn"), ("lora", "seq_bn")])
def test_a_union_is_the_stack_of_its_members(name: str, pair: tuple[str, str]) -> None:
    model, batch = model_with(name, *pair), inputs(name)
    model.add_adapter("union", ConfigUnion(*(ALL[method] for method in pair)))
    state = model.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            for method in pair:
                if f".{method}." in key:
                    state[key.replace(f".{method}.", ".union.")].copy_(value)
    close(run(model, batch, "union"), run(model, batch, Stack(*pair)))


@each_model
@pytest.mark.parametrize("bottleneck", ["adapter_plus", "seq_bn", "double_seq_bn"])
def test_tuned_norms_stand_beside_bottlenecks_that_use_the_norm(name: str, bottleneck: str) -> None:
    model, batch = model_with(name, "ln_tuning", bottleneck), inputs(name)
    stack, alone = Stack("ln_tuning", bottleneck), {}
    for setup in ("ln_tuning", bottleneck, stack):
        alone[str(setup)] = run(model, batch, setup)
    children = ["ln_tuning", bottleneck, stack]
    close(run(model, batch, Parallel(*children)), torch.cat([*alone.values()]))
    parts = [run(model, rows_of(batch, slice(0, 1)), "ln_tuning"), run(model, rows_of(batch, slice(1, 4)), stack)]
    close(run(model, batch, BatchSplit("ln_tuning", stack, batch_sizes=[1, 3])), torch.cat(parts))
    rows = output(model, batch, adapter_names=[stack, None, "ln_tuning", stack])
    close(rows[::3], alone[str(stack)][::3])
    close(rows[2], alone["ln_tuning"][2])
    close(run(model, batch, Split(stack, stack, splits=[2, None])), alone[str(stack)])
