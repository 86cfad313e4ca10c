"""LoRA in a mixture of experts: at the fused weights, each expert its own or shared, and at the router."""

import copy
from functools import cache

import pytest
import torch
from tiny_models import disturb
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import adapters
from adapters import (
    AdapterError,
    AdapterSetup,
    BatchSplit,
    CompositionError,
    LoRAConfig,
    MultiTask,
    Parallel,
    Split,
    Stack,
)
from adapters.composition import Average

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {
    "vocab_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 4,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZE, **TEXT, intermediate_size=24, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZE, **TEXT, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(
        **SIZE, **TEXT, sliding_window=8, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    ),
}
IDS = torch.arange(3, 27).view(4, 6)
EXPERTS = {"selfattn_lora": False, "intermediate_lora": True, "output_lora": True, "r": 2, "alpha": 4}
OWN, SHARED = LoRAConfig(**EXPERTS), LoRAConfig(**EXPERTS, shared_experts=True)
ROUTER = LoRAConfig(selfattn_lora=False, router_lora=True, r=2)
every_model = pytest.mark.parametrize("name", CONFIGS)
every_kind = pytest.mark.parametrize("config", [OWN, SHARED], ids=["own", "shared"])


@cache
def prototype(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for key, parameter in model.named_parameters():
        if "expert" in key or "router" in key:  # some are made of zeros, or of no values at all
            torch.nn.init.normal_(parameter.data, std=0.2)
    return model


def made(name, *configs):
    model = copy.deepcopy(prototype(name))
    adapters.init(model)
    torch.manual_seed(1)
    for letter, config in zip("abc", configs, strict=False):
        model.add_adapter(letter, config)
        disturb(model, letter)
    return model


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@every_model
def test_there_is_a_site_for_each_weight_of_all_experts(name):
    model = made(name, OWN)
    held = model.adapter_sites.holding("a")
    assert [site.location for site, _ in held] == ["intermediate_lora", "output_lora"] * 2
    for site, module in held:
        assert module.lora_A.shape == (4, 2, site.inputs) and module.lora_B.shape == (4, site.outputs, 2)
        assert site.weight.shape == (4, site.outputs, site.inputs)


@every_model
@every_kind
def test_adding_changes_nothing_and_deleting_leaves_no_trace(name, config):
    model = made(name)
    before, keys = logits(model), set(model.state_dict())
    model.add_adapter("a", config, set_active=True)
    torch.testing.assert_close(logits(model), before)
    with AdapterSetup(None):
        assert torch.equal(logits(model), before)
    model.delete_adapter("a")
    assert torch.equal(logits(model), before) and set(model.state_dict()) == keys
    assert all("forward" not in vars(module) for module in model.modules())


@every_model
@every_kind
def test_the_formula_and_merging(name, config):
    """The model with W_e + s B_e A_e in the place of every W_e gives the same."""
    model, merged = made(name, config), made(name, config)
    model.set_active_adapters("a")
    adapted, plain = logits(model), logits(merged)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    by_hand = copy.deepcopy(prototype(name))
    with torch.no_grad():
        for site, module in model.adapter_sites.holding("a"):
            delta = 2 * torch.einsum("...or,...ri->...oi", module.lora_B, module.lora_A)
            delta = delta.transpose(-1, -2) if name == "gpt_oss" else delta
            by_hand.base_model.get_parameter(f"{site.host_path}.{site.name}").add_(delta)
    torch.testing.assert_close(adapted, logits(by_hand), atol=1e-5, rtol=1e-4)
    merged.merge_adapter("a")
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-4)
    merged.reset_adapter()
    assert torch.equal(logits(merged), plain)


@every_model
@every_kind
def test_only_the_adapter_has_gradients_and_only_routed_experts_have_some(name, config):
    model = made(name, config)
    model.train_adapter("a")
    model.eval()
    model(IDS[:1, :1]).logits.sum().backward()  # one token, two experts
    trained = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all(".a." in key for key in trained)
    for _, module in model.adapter_sites.holding("a"):
        assert torch.isfinite(module.lora_B.grad).all() and module.lora_B.grad.abs().sum() > 0
        if config is OWN:
            assert (module.lora_B.grad.abs().sum((1, 2)) > 0).sum() == 2


def test_only_the_routed_experts_are_computed(monkeypatch):
    model = made("mixtral", OWN)
    model.set_active_adapters("a")
    maps = []
    monkeypatch.setattr("adapters.methods.experts.linear", lambda x, weight: maps.append(len(x)) or linear(x, weight))
    logits(model, IDS[:1, :1])
    assert maps == [1] * 2 * 2 * (2 + 4)  # layers, experts, weights with factors


@every_model
@every_kind
def test_saving_and_loading(name, config, tmp_path):
    model = made(name, config)
    model.set_active_adapters("a")
    model.save_adapter(tmp_path, "a")
    fresh = made(name)
    fresh.load_adapter(tmp_path, set_active=True)
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.adapters_config.get("a") == config
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(model))


@every_model
@every_kind
def test_composition(name, config):
    model = made(name, config, OWN)
    single = {}
    for letter in "ab":
        model.set_active_adapters(letter)
        single[letter] = logits(model)
    plain = logits(made(name))

    def gives(setup, expected, ids=IDS, **kwargs):
        model.set_active_adapters(setup)
        torch.testing.assert_close(logits(model, ids, **kwargs), expected, atol=1e-5, rtol=1e-4)

    gives(Average("a", "a"), single["a"])
    gives(BatchSplit("a", "b", batch_sizes=[1, 3]), torch.cat([single["a"][:1], single["b"][1:]]))
    gives(BatchSplit("a", None, batch_sizes=[3, 1]), torch.cat([single["a"][:3], plain[3:]]))
    gives(Parallel("a", "b"), torch.cat([single["a"], single["b"]]))
    mixed = torch.stack([single["ab"[row % 2]][row] for row in range(4)])
    gives(MultiTask("a", "b"), mixed, task_ids=[0, 1, 0, 1])
    gives(Split("a", "a", splits=[2, 4]), single["a"])
    model.set_active_adapters(Stack("a", "b"))
    stacked = logits(model)
    assert not torch.allclose(stacked, single["a"], atol=1e-3)
    gives(Stack("b", "a"), stacked)  # changes add up


@every_model
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
def test_checkpointing_has_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = made(name, OWN)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train_adapter(BatchSplit("a", "a", batch_sizes=[2, 2]))
        model(IDS).logits.square().mean().backward()
        found.append([module.lora_A.grad for _, module in model.adapter_sites.holding("a")])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


@every_model
def test_generation_with_a_cache_is_as_without(name):
    model = made(name, OWN)
    model.set_active_adapters("a")
    tokens = [model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


@every_model
def test_half_precision(name):
    model = made(name, OWN).to(torch.bfloat16)
    model.set_active_adapters("a")
    assert logits(model).dtype == torch.bfloat16 and torch.isfinite(logits(model)).all()
    model.merge_adapter("a")
    model.reset_adapter()


@every_model
def test_the_router(name):
    model = made(name, ROUTER, ROUTER)
    plain = logits(model)
    model.set_active_adapters("a")
    adapted = logits(model)
    assert [site.location for site, _ in model.adapter_sites.holding("a")] == ["router_lora"] * 2
    assert not torch.equal(adapted, plain)
    model.set_active_adapters(Average("a", "a"))
    torch.testing.assert_close(logits(model), adapted)
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[2, 2]))
    with pytest.raises(CompositionError, match="one weight for all rows; use a name, Stack or Average"):
        logits(model)
    model.train_adapter("a")
    model(IDS).logits.square().mean().backward()
    assert all(module.lora_B.grad.abs().sum() > 0 for _, module in model.adapter_sites.holding("a"))
    model.eval()
    model.merge_adapter("a")
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-4)
    model.reset_adapter()
    model.set_active_adapters(None)
    assert torch.equal(logits(model), plain)


@every_model
@pytest.mark.parametrize("method", ["seq_bn", "double_seq_bn", "loreft"])
def test_a_block_of_experts_takes_other_methods(name, method):
    model = made(name)
    plain = logits(model)
    model.add_adapter("a", method, set_active=True)
    disturb(model, "a")
    assert not torch.equal(logits(model), plain)


def test_targets_by_name():
    model = made("mixtral")
    model.add_adapter("a", LoRAConfig(target_modules=["experts.down_proj"]))
    assert [site.name for site, _ in model.adapter_sites.holding("a")] == ["down_proj"] * 2
    model.add_adapter("b", LoRAConfig(target_modules="all-linear"))
    assert {site.kind for site, _ in model.adapter_sites.holding("b")} == {"linear"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**EXPERTS, "use_gating": True}, "not possible at the weights of experts"),
        ({**EXPERTS, "lora_bias": True}, "not possible at the weights of experts"),
        ({**EXPERTS, "init_weights": "pissa"}, "not possible at the weights of experts"),
        ({**EXPERTS, "use_dora": True}, "has no site for 'intermediate_lora' and 'output_lora'"),
    ],
)
def test_refusals(config, message):
    model = made("mixtral")
    with pytest.raises(AdapterError, match=message):
        model.add_adapter("a", LoRAConfig(**config))
    assert list(model.adapters_config) == [] and all("forward" not in vars(module) for module in model.modules())


def test_models_without_experts():
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
    adapters.init(model)
    with pytest.raises(AdapterError, match="has no site for 'router_lora'"):
        model.add_adapter("a", ROUTER)


@every_model
def test_weights_without_data(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    adapters.init(model)
    for method in ("double_seq_bn", OWN, ROUTER):
        model.add_adapter(f"a{len(model.adapters_config)}", method)
    assert len(model.adapter_sites.holding("a0")) == 4
    assert all(parameter.is_meta for parameter in model.parameters())
