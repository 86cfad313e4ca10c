"""Groups C19 to C22, E and F of the defects of 1.x: configurations, saving, and the calls of users."""

import pytest
import torch
from tiny import IDS, add, close, differs, parameters, run, tiny, with_adapters

from adapters import AdapterConfig, AdapterError, BnConfig, ConfigUnion, Fuse, LoRAConfig, SeqBnConfig

SEQ = "seq_bn[reduction_factor=4]"
METHODS = {"seq_bn": SEQ, "lora": "lora[r=2]", "prefix_tuning": "prefix_tuning[prefix_length=3,bottleneck_size=4]"}


def state(model):
    """All that a failed call must leave alone."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return model.adapters_config.to_dict(), list(model.state_dict()), hooks, model.active_adapters


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.add_adapter_fusion(["a", "missing"]),
        lambda model: model.add_adapter_fusion(["a", "lora"]),
        lambda model: model.add_adapter("new", "seq_bn[non_linearity='nonsense']"),
        lambda model: model.add_adapter("new", {"non_linearity": "relu"}),
        lambda model: model.add_adapter("new", SeqBnConfig(reduction_factor={"0": 4})),
        lambda model: model.add_adapter("new", "seq_bn[phm_layer=True]"),
        lambda model: model.add_adapter("new", f"{SEQ}|{SEQ}"),
        lambda model: model.add_adapter("new.er", SEQ),
        lambda model: model.add_adapter("a", "compacter[phm_dim=3]", overwrite_ok=True),
        lambda model: model.add_adapter("new", LoRAConfig(leave_out=[0, 1])),
        lambda model: model.set_active_adapters("missing"),
        lambda model: model.train_adapter(Fuse("a", "b")),
    ],
)
def test_c19_c21_a_failed_call_leaves_nothing_behind(call):
    model = with_adapters("bert", {"a": SEQ, "b": SEQ, "lora": "lora"})
    before = state(model)
    with pytest.raises(AdapterError):
        call(model)
    assert state(model) == before


def test_c20_a_fusion_is_saved_alone(tmp_path):
    model = with_adapters("bert", {"a": SEQ, "b": SEQ, "c": SEQ})
    for names in (["a", "b"], ["a", "b", "c"]):
        model.add_adapter_fusion(names)
    model.save_adapter_fusion(tmp_path, "a,b", use_safetensors=False)
    saved = torch.load(tmp_path / "pytorch_model_adapter_fusion.bin", weights_only=True)
    assert saved
    assert all(".a,b." in key for key in saved)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_c22_new_adapters_have_the_models_dtype(config, dtype):
    model = tiny("bert").to(dtype)
    add(model, "a", config)
    assert {parameter.dtype for parameter in parameters(model, "a")} == {dtype}
    assert run(model, "a").dtype == dtype


@pytest.mark.parametrize(
    "config",
    ["lora[dropout=0.5]", "seq_bn[dropout=0.5]", "prefix_tuning[dropout=0.5]", "adapter_plus[stochastic_depth=0.5]"],
)
def test_e1_new_adapters_have_the_models_mode(config):
    model = with_adapters("bert", {"a": config})
    assert not any(module.training for module in model.modules())
    assert torch.equal(run(model, "a"), run(model, "a"))
    model.train().add_adapter("b", config)
    assert all(module.training for name, module in model.named_modules() if "b" in name.split("."))


def test_e10_the_second_positional_argument_need_not_be_a_mask():
    model = with_adapters("gpt2", {"a": "lora[use_gating=True]"})
    model.set_active_adapters("a")
    cache = model(IDS[:, :3], use_cache=True).past_key_values
    positional = model(IDS[:, 3:], cache)[0]
    cache = model(IDS[:, :3], use_cache=True).past_key_values
    close(positional, model(input_ids=IDS[:, 3:], past_key_values=cache)[0])


def test_f5_a_union_has_the_methods_of_a_config():
    union = AdapterConfig.load("mam")
    assert union.get("x") is None
    assert all(member.use_gating for member in AdapterConfig.load("unipelt").configs)
    assert all(member.use_gating for member in AdapterConfig.load("mam", use_gating=True).configs)


def test_f6_two_loras_of_a_union_may_share_the_layers():
    model = with_adapters("bert", {"a": ConfigUnion(LoRAConfig(r=2, leave_out=[0]), LoRAConfig(r=4, leave_out=[1]))})
    ranks = {site.layer: module.config.r for site, module in model.adapter_sites.holding("a")}
    assert ranks == {0: 4, 1: 2}


@pytest.mark.parametrize("config", METHODS)
def test_f7_a_seed_of_0_is_one_and_stays_inside(config):
    model, following = tiny("bert"), set()
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        model.add_adapter(name, AdapterConfig.load(config, init_weights_seed=0))
        following.add(float(torch.rand(())))
    for one, other in zip(parameters(model, "a"), parameters(model, "b"), strict=True):
        assert torch.equal(one, other)
    assert len(following) == 2


def test_f8_layers_may_be_given_as_numbers():
    config = BnConfig(False, True, {0: 4, "default": 8}, "relu")
    model = with_adapters("bert", {"a": config})
    assert [module.adapter_up.in_features for _, module in model.adapter_sites.holding("a")] == [4, 2]
    assert config == BnConfig(False, True, {"0": 4, "default": 8}, "relu")


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_f12_checkpointing_changes_no_gradient(config, reentrant):
    model = with_adapters("bert", {"a": config})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train_adapter("a")
    model(IDS)[0].square().sum().backward()
    expected = [parameter.grad for parameter in parameters(model, "a")]
    model.zero_grad()
    with pytest.warns(FutureWarning, match="deprecated"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(IDS)[0].square().sum().backward()
    close([parameter.grad for parameter in parameters(model, "a")], expected)


def test_f13_stochastic_depth_needs_nothing_else():
    model = with_adapters(
        "bert", {"a": "adapter_plus[stochastic_depth=0.5]", "b": "adapter_plus[stochastic_depth=None]"}
    )
    torch.manual_seed(0)
    outputs = [run(model.train(), "a") for _ in range(4)]
    assert any(differs(outputs[0], other) for other in outputs[1:])
    assert torch.equal(run(model.eval(), "a"), run(model, "a"))
    assert differs(run(model, "b"), run(model, None))


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi"])
def test_f14_adapter_plus_on_any_model(name):
    model = with_adapters(name, {"a": "adapter_plus"})
    assert differs(run(model, "a"), run(model, None))
