"""Group A of the defects of 1.x (and what they have to do with LoRA): composition."""

import pytest
import torch
from tiny import IDS, PADDING, add, close, differs, run, stir, tiny, with_adapters

from adapters import Average, BatchSplit, CompositionError, Fuse, LoRAConfig, Parallel, Stack

METHODS = {
    "seq_bn": "seq_bn[reduction_factor=4]",
    "par_bn": "par_bn[reduction_factor=4]",
    "lora": "lora[r=2,alpha=4]",
    "prefix_tuning": "prefix_tuning[prefix_length=3,bottleneck_size=4]",
}
each_method = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


@each_method
def test_a1_the_average_of_two_equal_adapters_is_one_of_them(config):
    model = with_adapters("bert", {"a": config})
    close(run(model, Average("a", "a")), run(model, "a"))
    close(run(model, Average("a", "a", weights=[3, 1])), run(model, "a"))
    assert differs(run(model, "a"), run(model, None))


@each_method
def test_a2_a_stack_within_parallel_is_the_plain_stack(config):
    model = with_adapters("bert", {"a": config, "b": config})
    stack = run(model, Stack("a", "b"))
    close(run(model, Parallel(Stack("a", "b"), Stack("b"))), torch.cat([stack, run(model, "b")]))
    split = run(model, BatchSplit(Stack("a", "b"), "b", batch_sizes=[1, 3]))
    close(split, torch.cat([stack[:1], run(model, "b")[1:]]))


def test_a3_stacked_loras_add_up():
    """On rectangular maps, too: each sees the layer's input, so the stack is the sum of both changes of the weight."""
    config = LoRAConfig(r=2, alpha=6, selfattn_lora=False, intermediate_lora=True)
    model, merged = with_adapters("bert", {"a": config, "b": config}), tiny("bert")
    for layer, other in zip(model.encoder.layer, merged.encoder.layer, strict=True):
        for lora in layer.intermediate.dense.loras.values():
            other.intermediate.dense.weight.data += 3 * lora.lora_B.data @ lora.lora_A.data
    close(run(model, Stack("a", "b")), run(merged, None))


def test_a4_stacked_parallel_bottlenecks_both_act():
    """Both see the residual stream, so the stack is one bottleneck whose units are those of both."""
    model = with_adapters("bert", {"a": "par_bn[reduction_factor=4]", "b": "par_bn[reduction_factor=4]"})
    model.add_adapter("both", "par_bn[reduction_factor=2]")
    for layer in model.encoder.layer:
        one, other, both = layer.output_adapters.adapters.values()
        for name, dim in {"adapter_down.0.weight": 0, "adapter_down.0.bias": 0, "adapter_up.weight": 1}.items():
            parts = [part.get_parameter(name).data for part in (one, other)]
            both.get_parameter(name).data = torch.cat(parts, dim)
        both.adapter_up.bias.data = one.adapter_up.bias.data + other.adapter_up.bias.data
    close(run(model, Stack("a", "b")), run(model, "both"))


@pytest.mark.parametrize("setup", [Parallel("a", "b"), Parallel("b", "a"), Parallel(Stack("a", "c"), "b")], ids=str)
def test_a5_fused_projections_take_every_block(setup):
    configs = {"a": "lora[r=2,attn_matrices=['q','v']]", "b": "lora[r=3,attn_matrices=['k']]", "c": METHODS["seq_bn"]}
    model = with_adapters("gpt2", configs)
    close(run(model, setup), torch.cat([run(model, child) for child in setup]))


LORA_KINDS = {
    "add": "lora[r=2,alpha=4]",
    "scale": "lora[r=1,composition_mode='scale',init_weights='ia3']",
    "gated": "lora[r=2,use_gating=True]",
}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a7_kinds_of_lora_share_a_batch(name):
    model = with_adapters(name, LORA_KINDS)
    for setup in (Parallel(*LORA_KINDS), Parallel(*reversed(LORA_KINDS))):
        close(run(model, setup), torch.cat([run(model, child) for child in setup]))


LACKING = {
    "seq_bn": (METHODS["seq_bn"], "seq_bn[reduction_factor=4,leave_out=[0]]"),
    "lora": (METHODS["lora"], "lora[r=2,leave_out=[0]]"),
    "lora_matrices": (METHODS["lora"], "lora[r=2,attn_matrices=['k']]"),
    "prefix_tuning": (METHODS["prefix_tuning"], "prefix_tuning[prefix_length=3,leave_out=[0]]"),
    "methods": (METHODS["lora"], METHODS["seq_bn"]),
}


@pytest.mark.parametrize("configs", LACKING.values(), ids=LACKING)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a8_a_child_without_a_module_is_the_plain_model_there(configs, order):
    model = with_adapters("bert", dict(zip("ab", configs, strict=True)))
    apart = torch.cat([run(model, child) for child in order])
    close(run(model, Parallel(*order)), apart)
    close(run(model, BatchSplit(*order, batch_sizes=[2, 2])), torch.cat([apart[:2], apart[6:]]))


@pytest.mark.parametrize("mask", [None, PADDING], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a9_prefixes_of_different_lengths_share_a_batch(name, mask):
    short, long = ("prefix_tuning[flat=True,prefix_length=2]", "prefix_tuning[flat=True,prefix_length=5]")
    model = with_adapters(name, {"short": short, "long": long})
    apart = torch.cat([run(model, "short", mask=mask), run(model, "long", mask=mask)])
    close(run(model, Parallel("short", "long"), mask=mask), apart)


def test_a10_fusing_loras_is_refused_before_any_forward():
    model = with_adapters("bert", {"a": METHODS["lora"], "b": METHODS["lora"]})
    with pytest.raises(CompositionError, match="none of them is a bottleneck adapter"):
        model.add_adapter_fusion(["a", "b"])
    with pytest.raises(CompositionError, match="AdapterFusion works on bottleneck adapters"):
        model.set_active_adapters(Fuse("a", "b"))
    assert not model.adapters_config.fusions
    assert model.active_adapters is None


def test_a11_a_batch_of_another_size_is_repeated_all_the_same():
    model = with_adapters("bert", {"a": METHODS["lora"], "b": METHODS["lora"]})
    for rows in (2, 4, 1):
        apart = torch.cat([run(model, child, IDS[:rows]) for child in "ab"])
        close(run(model, Parallel("a", "b"), IDS[:rows]), apart)


def test_b7_whole_numbers_are_vera_start_values():
    """They are not taken for "no VeRA", which makes a plain LoRA."""
    config = LoRAConfig(vera_d=1, vera_b=0)
    assert (config.vera_d, config.vera_b) == (1.0, 0.0)
    model = tiny("bert")
    model.add_adapter("a", config)
    assert {type(module).__name__ for _, module in model.adapter_sites.holding("a")} == {"VeRA"}


@pytest.mark.parametrize("kind", ["add", "scale"])
def test_b9_alpha_scales_a_gated_lora(kind):
    model = tiny("bert")
    for name, alpha in {"a": 1, "b": 3}.items():
        add(model, name, LoRAConfig(r=1, alpha=alpha, use_gating=True, composition_mode=kind, init_weights="ia3"))
    for layer in model.encoder.layer:
        for projection in (layer.attention.self.query, layer.attention.self.value):
            one, other = projection.loras.values()
            other.load_state_dict(one.state_dict())
    plain = tiny("bert")
    x = torch.randn(1, 3, 16)
    query = model.encoder.layer[0].attention.self.query
    outputs = {}
    for name in ("a", "b"):
        model.set_active_adapters(name)
        outputs[name] = query(x)
    start = plain.encoder.layer[0].attention.self.query(x) if kind == "add" else 0
    close(outputs["b"] - start, 3 * (outputs["a"] - start))


def test_b20_the_output_projection_takes_a_lora():
    model = with_adapters("bert", {"a": "lora[r=2,attn_matrices=['o']]"})
    assert {site.host_path.rsplit(".", 2)[1] for site, _ in model.adapter_sites.holding("a")} == {"output"}
    assert differs(run(model, "a"), run(model, None))


def test_blocks_are_equal_if_all_of_them_is():
    """1.x compares the children up to the shorter list."""
    assert Stack("a", "b") != Stack("a")
    assert BatchSplit("a", "b", batch_sizes=[1, 2]) != BatchSplit("a", "b", batch_sizes=[2, 1])
    assert Fuse("a", "b", name="f") != Fuse("a", "b")
    assert hash(Stack("a", Parallel("b", "c"))) == hash(Stack("a", Parallel("b", "c")))


def test_stacked_methods_know_no_order_of_kinds():
    model = with_adapters("bert", {"a": METHODS["lora"], "b": METHODS["prefix_tuning"], "c": METHODS["seq_bn"]})
    close(run(model, Stack("a", "b", "c")), run(model, Stack("c", "b", "a")))
    stir(model.get_adapter("a")[0]["selfattn_lora"].parameters(), 5.0)
    assert differs(run(model, Stack("a", "c")), run(model, "c"))
