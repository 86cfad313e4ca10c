"""Merging adapters into weights, averaging adapters and heads."""

import copy

import pytest
import torch
from tiny_models import METHODS, adapted, config, disturb, inputs, output, plain, run

import adapters
import adapters.averaging
from adapters import AdapterError, BertAdapterModel, ConfigError, LoRAConfig, UnknownAdapterError


def with_loras(name: str = "bert", **fields):
    model = adapted(name)
    for adapter in ("a", "b"):
        model.add_adapter(adapter, METHODS["lora"].replace(**fields))
        disturb(model, adapter)
    return model


def weights_of(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, weights) -> bool:
    now = model.state_dict()
    return now.keys() == weights.keys() and all(torch.equal(now[key], value) for key, value in weights.items())


def changes(model, name: str) -> list[torch.Tensor]:
    return [module.merged_weight(torch.zeros_like(site.weight)) for site, module in model.adapter_sites.holding(name)]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_deleting_a_merged_adapter_restores_the_weights(name: str) -> None:
    model = with_loras(name)
    plain_weights = {key: value for key, value in weights_of(model).items() if ".a." not in key}
    model.merge_adapter("a")
    assert model.adapter_sites.merged == "a"
    model.delete_adapter("a")
    assert unchanged(model, plain_weights)
    model.reset_adapter()
    model.set_active_adapters("b")


@torch.no_grad()
def test_b21_a_vector_with_zeros_is_reset() -> None:
    model = adapted("bert", "ia3")
    before = weights_of(model)
    for _, module in model.adapter_sites.holding("ia3"):
        module.lora_B[0] = 0
        before |= {key: value.clone() for key, value in model.state_dict().items() if ".ia3." in key}
    model.merge_adapter("ia3")
    model.reset_adapter()
    assert unchanged(model, before)


def test_f11_weights_by_name_and_weights_of_sum_0() -> None:
    model = with_loras()
    model.average_adapter("x", {"a": 1, "b": 3})
    model.average_adapter("y", ["a", "b"], [0.25, 0.75])
    assert torch.equal(run(model, inputs("bert"), "x"), run(model, inputs("bert"), "y"))
    with pytest.raises(AdapterError, match="their sum is 0"):
        model.average_adapter("z", {"a": 1, "b": -1})


def test_others_act_on_top_of_a_merged_adapter() -> None:
    model, batch = with_loras(), inputs("bert")
    both = run(model, batch, adapters.Stack("a", "b"))
    model.merge_adapter("a")
    for setup in ("b", adapters.Stack("a", "b")):
        torch.testing.assert_close(run(model, batch, setup), both, rtol=1e-4, atol=1e-5)


def test_activating_and_training_take_the_merged_adapter_out() -> None:
    model = with_loras()
    before = weights_of(model)
    for verb in (model.set_active_adapters, model.train_adapter):
        model.merge_adapter("a")
        assert not unchanged(model, before)
        verb("b")
        assert unchanged(model, before)


def test_merged_weights_may_be_kept() -> None:
    model, batch = with_loras(), inputs("bert")
    wanted = run(model, batch, "a")
    model.merge_adapter("a", delete_adapter=True)
    model.delete_adapter("b")
    assert model.state_dict().keys() == plain("bert").state_dict().keys()
    bare = plain("bert")
    bare.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(bare, batch), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_with_a_merged_adapter_is_saved_without_it_in_the_weights(tmp_path) -> None:
    model, batch = with_loras(), inputs("bert")
    before, active = weights_of(model), run(model, batch, "a")
    model.merge_adapter("a")
    merged = weights_of(model)
    model.save_pretrained(tmp_path)
    assert unchanged(model, merged)
    other = adapters.load_model(tmp_path, type(plain("bert")))
    assert unchanged(other, before)
    assert torch.equal(run(other, batch, "a"), active)


def test_a_copy_of_a_model_with_a_merged_adapter_can_be_reset() -> None:
    model = with_loras()
    before = weights_of(model)
    model.merge_adapter("a")
    other = copy.deepcopy(model)
    other.reset_adapter()
    assert unchanged(other, before)
    assert not unchanged(model, before)


def test_what_cannot_be_merged_changes_nothing() -> None:
    model = adapted("bert", "lora", "gated_lora", "seq_bn", "mam")
    before = weights_of(model)
    with pytest.raises(AdapterError, match="Cannot merge LoRA layer with gating"):
        model.merge_adapter("gated_lora")
    for name in ("seq_bn", "mam"):
        with pytest.raises(AdapterError, match=r"merge_adapter.*Keep|keep"):
            model.merge_adapter(name)
    with pytest.raises(UnknownAdapterError, match="No adapter with name 'nobody' found"):
        model.merge_adapter("nobody")
    assert unchanged(model, before)
    model.add_adapter("c", "lora")
    model.merge_adapter("lora")
    with pytest.raises(AdapterError, match=r"already has a merged adapter, 'lora'\. Please reset it first"):
        model.merge_adapter("c")


def test_quantised_weights_are_refused() -> None:
    model = with_loras()
    query = model.encoder.layer[0].attention.self.query
    query.weight = torch.nn.Parameter(query.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"can be read, but not be quantised anew"):
        model.merge_adapter("a")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_svd_averages_the_changes(name: str) -> None:
    model, shares = with_loras(name, r=2, alpha=4), (0.25, 0.75)
    model.average_adapter("x", ["a", "b"], [1, 3], combine_strategy="lora_delta_w_svd", svd_rank=4)
    assert (model.adapters_config.get("x").r, model.adapters_config.get("x").alpha) == (4, 4)
    for a, b, x in zip(*(changes(model, adapter) for adapter in "abx"), strict=True):
        torch.testing.assert_close(x, shares[0] * a + shares[1] * b, rtol=1e-4, atol=1e-5)
    model.average_adapter("wide", ["a", "b"], combine_strategy="lora_delta_w_svd", svd_rank=20)
    model.average_adapter("narrow", ["a", "b"], combine_strategy="lora_delta_w_svd", svd_rank=1)
    for a, b, wide, narrow in zip(*(changes(model, adapter) for adapter in ("a", "b", "wide", "narrow")), strict=True):
        mean = (a + b) / 2
        torch.testing.assert_close(wide, mean, rtol=1e-4, atol=1e-5)
        left, sizes, right = torch.linalg.svd(mean)
        torch.testing.assert_close(narrow, sizes[0] * left[:, :1] @ right[:1], rtol=1e-3, atol=1e-5)


def test_negative_weights_negate_b_alone() -> None:
    model = with_loras()
    model.average_adapter("x", {"a": 2, "b": -1}, combine_strategy="lora_linear_only_negate_b", normalize_weights=False)
    for (_, a), (_, b), (_, x) in zip(*(model.adapter_sites.holding(name) for name in "abx"), strict=True):
        torch.testing.assert_close(x.lora_A, 2 * a.lora_A + b.lora_A)
        torch.testing.assert_close(x.lora_B, 2 * a.lora_B - b.lora_B)
    model = adapted("bert", "ia3")
    model.average_adapter("x", ["ia3", "ia3"], [1, 2], combine_strategy="lora_linear_only_negate_b")
    torch.testing.assert_close(run(model, inputs("bert"), "x"), run(model, inputs("bert"), "ia3"))


def test_weights_are_equal_and_normalised_by_default() -> None:
    model = with_loras()
    for name, options in {"x": {}, "y": {"weights": [3, 3]}, "z": {"normalize_weights": False}}.items():
        model.average_adapter(name, ["a", "b"], **options)
        for (_, a), (_, b), (_, x) in zip(*(model.adapter_sites.holding(n) for n in ("a", "b", name)), strict=True):
            torch.testing.assert_close(x.lora_A, (a.lora_A + b.lora_A) / 2)
    model.average_adapter("x", ["a"], overwrite_ok=True, set_active=True)
    assert model.active_adapters == adapters.Stack("x")
    assert torch.equal(output(model, inputs("bert")), run(model, inputs("bert"), "a"))
    model.average_adapter("a", ["a", "b"], [0, 1], overwrite_ok=True)
    assert torch.equal(run(model, inputs("bert"), "a"), run(model, inputs("bert"), "b"))


REFUSED = {
    "Invalid combine_strategy 'mean'. Must be one of": {"combine_strategy": "mean"},
    "No adapters to average. Please provide": {"adapter_list": []},
    "'a' is no list of names": {"adapter_list": "a"},
    "Adapter nobody not found": {"adapter_list": ["a", "nobody"]},
    "one number for each of 'a' and 'b'": {"weights": [1]},
    "their sum is 0": {"weights": [1, -1]},
    "svd_rank must be set when using": {"combine_strategy": "lora_delta_w_svd"},
    "svd_rank=0.: it must be a whole number": {"combine_strategy": "lora_delta_w_svd", "svd_rank": 0},
    "Cannot average adapters with different configurations": {"adapter_list": ["a", "other"]},
    "already been added": {"adapter_name": "b"},
    "Combining adapters with ConfigUnion is only supported": {
        "adapter_list": ["mam", "mam"],
        "combine_strategy": "lora_linear_only_negate_b",
    },
    "lora_linear_only_negate_b not supported for the chosen adapter methods": {
        "adapter_list": ["gated_lora"],
        "combine_strategy": "lora_linear_only_negate_b",
    },
    "lora_delta_w_svd not supported for the chosen adapter methods": {
        "adapter_list": ["ia3"],
        "combine_strategy": "lora_delta_w_svd",
        "svd_rank": 1,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_average_changes_nothing(message: str) -> None:
    model = adapted("bert", "mam", "ia3", "gated_lora")
    for name, rank in (("a", 2), ("b", 2), ("other", 4)):
        model.add_adapter(name, LoRAConfig(r=rank))
    before, names = weights_of(model), list(model.adapters_config)
    asked = {"adapter_name": "x", "adapter_list": ["a", "b"]} | REFUSED[message]
    with pytest.raises(AdapterError, match=message):
        model.average_adapter(**asked)
    assert unchanged(model, before)
    assert list(model.adapters_config) == names


def test_dropout_and_start_values_may_differ() -> None:
    model = adapted("bert")
    model.add_adapter("a", LoRAConfig(dropout=0.1))
    model.add_adapter("b", LoRAConfig(init_weights="bert"))
    model.average_adapter("x", ["a", "b"])
    assert model.adapters_config.get("x").dropout == 0.1


def test_positions_are_not_averaged() -> None:
    shares = adapters.averaging.Shares.of("average", ["a", "b"], None, True)
    with pytest.raises(AdapterError, match="they differ in 'places', which holds positions"):
        shares.mean([{"places": torch.tensor([1])}, {"places": torch.tensor([2])}])


def test_an_average_of_heads() -> None:
    model = BertAdapterModel(config("bert")).eval()
    adapters_of = {"a": 2, "b": 2, "other": 3}
    for name, labels in adapters_of.items():
        model.add_classification_head(name, num_labels=labels)
    model.add_tagging_head("tags", num_labels=2)
    model.average_head("x", {"a": 1, "b": 3}, set_active=True)
    assert model.active_head == "x"
    assert model.heads["x"].name == "x"
    states = [model.heads[name].state_dict() for name in ("a", "b", "x")]
    for key, value in states[2].items():
        torch.testing.assert_close(value, states[0][key] / 4 + states[1][key] * 3 / 4)
    for message, names in {
        "Cannot average heads of different classes": ["a", "tags"],
        "Cannot average heads with different configurations": ["a", "other"],
        "nobody": ["a", "nobody"],
    }.items():
        with pytest.raises(AdapterError, match=message):
            model.average_head("y", names)
    with pytest.raises(AdapterError, match="already"):
        model.average_head("x", ["a"])
    with pytest.raises(ConfigError, match="Invalid combine_strategy"):
        model.average_adapter("y", ["a"], combine_strategy="median")


ELEMENTWISE = {"ties": 0.5, "dare_linear": 0.5, "dare_ties": 0.5, "magnitude_prune": 0.5}


def test_any_method_can_be_pruned_and_elected() -> None:
    model = plain("bert")
    adapters.init(model)
    for name in ("a", "b"):
        model.add_adapter(name, METHODS["seq_bn"])
        disturb(model, name)
    model.average_adapter("x", ["a", "b"], combine_strategy="ties", density=0.5)
    for (_, a), (_, b), (_, x) in zip(*(model.adapter_sites.holding(name) for name in "abx"), strict=True):
        for key, found in x.state_dict().items():
            kept = []
            for tensor in (a.state_dict()[key], b.state_dict()[key]):
                smallest = tensor.abs().flatten().sort(descending=True).values[tensor.numel() // 2 - 1]
                kept.append(torch.where(tensor.abs() >= smallest, tensor, 0.0))
            positive = sum(kept) >= 0
            chosen = [torch.where((part > 0) == positive, part, 0.0) * (part != 0) for part in kept]
            count = sum((part != 0).float() for part in chosen).clamp(min=1)
            torch.testing.assert_close(found, sum(chosen) / count)
    for strategy, density in ELEMENTWISE.items():
        model.average_adapter(strategy, {"a": 1, "b": -0.5}, combine_strategy=strategy, density=density)
        assert torch.isfinite(run(model, inputs("bert"), strategy)).all()


def test_keeping_all_is_the_weighted_sum() -> None:
    model = with_loras()
    for name, strategy in {"x": "lora_linear", "y": "dare_linear", "z": "magnitude_prune"}.items():
        density = None if strategy == "lora_linear" else 1
        model.average_adapter(name, {"a": 2, "b": -1}, combine_strategy=strategy, density=density)
    for x, y, z in zip(*(changes(model, name) for name in "xyz"), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("strategy", ["lora_cat", "svd"])
def test_ranks_scales_and_starts_may_differ_where_changes_are_combined(strategy: str) -> None:
    model = adapted("gpt2")
    fields = {"attn_matrices": ["q", "v"], "intermediate_lora": True}
    model.add_adapter("a", LoRAConfig(r=2, alpha=6, use_rslora=True, rank_pattern={"v": 3}, lora_bias=True, **fields))
    model.add_adapter("b", LoRAConfig(r=4, alpha=8, init_weights="pissa", lora_bias=True, **fields))
    model.add_adapter("c", LoRAConfig(r=1, alpha=2, rank_pattern={"q": 0}, lora_bias=True, **fields))
    for name in "abc":
        disturb(model, name)
    shares = {"a": 0.5, "b": 0.75, "c": -0.25}
    model.average_adapter("x", shares, combine_strategy=strategy, svd_rank=None if strategy == "lora_cat" else 12)
    assert (model.adapters_config.get("x").use_rslora, model.adapters_config.get("x").rank_pattern) == (False, {})
    wanted: dict[str, list] = {}
    for name, share in shares.items():
        for site, module in model.adapter_sites.holding(name):
            zeros = torch.zeros_like(site.weight), torch.zeros_like(site.bias)
            both = share * module.merged_weight(zeros[0]), share * module.merged_bias(zeros[1])
            wanted[site.path] = [old + new for old, new in zip(wanted.get(site.path, zeros), both, strict=True)]
    for site, module in model.adapter_sites.holding("x"):
        weight, bias = wanted[site.path]
        torch.testing.assert_close(module.merged_weight(torch.zeros_like(weight)), weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.merged_bias(torch.zeros_like(bias)), bias, rtol=1e-4, atol=1e-5)


REFUSED_OPTIONS = {
    "density is None; give the share of values to keep": {"combine_strategy": "ties"},
    "density is 0; give": {"combine_strategy": "dare_ties", "density": 0},
    "it drops no values; leave out density=0.5": {"density": 0.5},
    "majority_sign_method 'most' is not 'total' or 'frequency'": {"majority_sign_method": "most"},
    "or PEFT's name of one": {"combine_strategy": "median"},
    "lora_cat not supported for the chosen": {"adapter_list": ["bottle"], "combine_strategy": "lora_cat"},
    "ties_svd not supported": {"adapter_list": ["dora"], "combine_strategy": "ties_svd", "density": 0.5},
    "lora_linear not supported": {"adapter_list": ["pissa"], "combine_strategy": "lora_linear"},
    "only some of them keep their start": {"adapter_list": ["a", "pissa"]},
    "differ in more than 'dropout', 'init_weights', 'alpha'": {
        "adapter_list": ["a", "wide"],
        "combine_strategy": "lora_linear",
    },
}


def test_refused_strategies_change_nothing() -> None:
    model = with_loras(r=4)
    for name, settings in {
        "bottle": METHODS["seq_bn"],
        "dora": METHODS["lora"].replace(use_dora=True),
        "pissa": METHODS["lora"].replace(init_weights="pissa"),
        "wide": METHODS["lora"].replace(r=8),
    }.items():
        model.add_adapter(name, settings)
    before, names = weights_of(model), list(model.adapters_config)
    for message, options in REFUSED_OPTIONS.items():
        with pytest.raises(AdapterError, match=message):
            model.average_adapter(**{"adapter_name": "x", "adapter_list": ["a", "b"]} | options)
        assert unchanged(model, before)
        assert list(model.adapters_config) == names
