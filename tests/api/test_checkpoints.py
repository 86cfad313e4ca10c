"""Folders of adapters, fusions, heads and setups: what is in them, and that loading gives back what was saved."""

import json
import re

import pytest
import torch
from head_models import CONFIGS, ENCODER_DECODERS, batch, config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertForSequenceClassification, XLMRobertaConfig

import adapters
from adapters import AdapterError, AutoAdapterModel, BnConfig, ConfigUnion, LoRAConfig, PrefixTuningConfig
from adapters.checkpoints import WeightsLoader, names
from adapters.composition import BatchSplit, Fuse, Parallel, Stack

METHODS = {
    "bottleneck": BnConfig(
        mh_adapter=True,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="relu",
        ln_before=True,
        ln_after=True,
        use_gating=True,
        scaling="channel",
    ),
    "lora": LoRAConfig(
        r=2, attn_matrices=["q", "v"], intermediate_lora=True, output_lora=True, use_gating=True, leave_out=[1]
    ),
    "scale": LoRAConfig(r=1, attn_matrices=["k", "v"], composition_mode="scale", init_weights="ia3"),
    "prefix": PrefixTuningConfig(prefix_length=3, bottleneck_size=5, use_gating=True),
    "flat": PrefixTuningConfig(prefix_length=3, flat=True),
    "union": ConfigUnion(LoRAConfig(r=2), PrefixTuningConfig(prefix_length=2, flat=True)),
}
# One key of each kind in a file of 1.3.0; {} stands for the adapter's name.
KEYS_1X = {
    "bert": ["bert.encoder.layer.0.attention.output.adapters.{}", "bert.encoder.layer.1.output.adapters.{}"],
    "roberta": ["roberta.encoder.layer.0.attention.output.adapters.{}", "roberta.encoder.layer.1.output.adapters.{}"],
    "distilbert": [
        "distilbert.transformer.layer.0.attention_adapters.adapters.{}",
        "distilbert.transformer.layer.1.output_adapters.adapters.{}",
    ],
    "albert": [
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.attention_adapters.adapters.{}",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.output_adapters.adapters.{}",
    ],
    "gpt2": ["transformer.h.0.attention_adapters.adapters.{}", "transformer.h.1.output_adapters.adapters.{}"],
    "llama": ["model.layers.0.attention_adapters.adapters.{}", "model.layers.1.output_adapters.adapters.{}"],
    "mistral": ["model.layers.0.attention_adapters.adapters.{}", "model.layers.1.output_adapters.adapters.{}"],
    "t5": [
        "transformer.encoder.block.0.layer.0.adapters.{}",
        "transformer.encoder.block.0.layer.1.adapters.{}",
        "transformer.decoder.block.1.layer.0.adapters.{}",
        "transformer.decoder.block.1.layer.2.adapters.{}",
    ],
    "bart": [
        "model.encoder.layers.0.attention_adapters.adapters.{}",
        "model.decoder.layers.1.output_adapters.adapters.{}",
    ],
    "vit": [
        "vit.encoder.layer.0.attention_adapters.adapters.{}",
        "vit.encoder.layer.1.output.output_adapters.adapters.{}",
    ],
}
LORA_KEYS_1X = {
    "bert": "bert.encoder.layer.0.attention.self.query.loras.{}.lora_A",
    "distilbert": "distilbert.transformer.layer.0.attention.q_lin.loras.{}.lora_A",
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.loras.{}.lora_B",
    "gpt2": "transformer.h.0.attn.c_attn.loras.{}.lora_A",
    "llama": "model.layers.0.mlp.down_proj.loras.{}.lora_A",
    "t5": "transformer.decoder.block.0.layer.1.EncDecAttention.v.loras.{}.lora_A",
    "bart": "model.decoder.layers.0.encoder_attn.q_proj.loras.{}.lora_A",
    "vit": "vit.encoder.layer.0.attention.attention.query.loras.{}.lora_A",
}
PREFIX_KEYS_1X = {
    "bert": "bert.prefix_tuning.prefix_tunings.{}.self_prefix.wte.weight",
    "distilbert": "distilbert.prefix_tuning.prefix_tunings.{}.self.wte.weight",
    "t5": "transformer.prefix_tuning.prefix_tunings.{}.cross_prefix.control_trans.2.bias",
    "bart": "model.encoder.layers.0.self_attn.prefix_tuning.prefix_gates.{}.weight",
    "vit": "vit.encoder.layer.0.attention.attention.prefix_tuning.prefix_gates.{}.bias",
}


def flexible(name="bert", seed=0):
    torch.manual_seed(seed)
    return AutoAdapterModel.from_config(config(name)).eval()


def bare(name="bert", seed=0):
    torch.manual_seed(seed)
    model = AutoModel.from_config(config(name)).eval()
    adapters.init(model)
    return model


MAKERS = {"flexible": flexible, "bare": bare}


@torch.no_grad()
def disturb(module):
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4)


def with_adapter(make, name, method, adapter="a"):
    model = make(name)
    model.add_adapter(adapter, config=METHODS[method])
    for parameter in trained(model, adapter).values():
        disturb(torch.nn.ParameterList([parameter]))
    return model


def trained(model, adapter):
    """The parameters of an adapter by live name below the base model."""
    return {
        key: value for key, value in model.base_model.named_parameters() if re.search(rf"\.{re.escape(adapter)}\.", key)
    }


def same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def settings(folder, file="adapter_config.json"):
    return json.loads((folder / file).read_text())


def edit(folder, file="adapter_config.json", **changes):
    (folder / file).write_text(json.dumps({**settings(folder, file), **changes}))


def rename_keys(folder, pattern, replacement, file="adapter.safetensors"):
    weights = {re.sub(pattern, replacement, key): value for key, value in load_file(folder / file).items()}
    save_file(weights, folder / file)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_gives_back_what_was_saved(name, method, tmp_path):
    saved = with_adapter(bare, name, method)
    saved.save_adapter(tmp_path, "a")
    loaded, info = bare(name), {}
    assert loaded.load_adapter(tmp_path, loading_info=info) == "a"
    same(trained(saved, "a"), trained(loaded, "a"))
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert loaded.adapters_config.get("a") == saved.adapters_config.get("a")
    assert loaded.active_adapters is None
    with torch.no_grad():
        inputs = batch(name)
        if name in ENCODER_DECODERS:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        for model in (saved, loaded):
            model.set_active_adapters("a")
        torch.testing.assert_close(loaded(**inputs)[0], saved(**inputs)[0])


@pytest.mark.parametrize(("source", "target"), [("flexible", "bare"), ("bare", "flexible"), ("flexible", "flexible")])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "vit"])
def test_models_with_and_without_heads_exchange_adapters(name, source, target, tmp_path):
    saved = with_adapter(MAKERS[source], name, "union")
    saved.save_adapter(tmp_path, "a")
    loaded = MAKERS[target](name)
    loaded.load_adapter(tmp_path)
    same(trained(saved, "a"), trained(loaded, "a"))


@pytest.mark.parametrize("name", KEYS_1X)
def test_bottleneck_keys_are_those_of_1x(name, tmp_path):
    with_adapter(flexible, name, "bottleneck", "sst2").save_adapter(tmp_path, "sst2")
    keys = load_file(tmp_path / "adapter.safetensors").keys()
    paths = {key.partition(".sst2.")[0] + ".sst2" for key in keys}
    assert {key.format("sst2") for key in KEYS_1X[name]} <= paths
    suffixes = {key.partition(".sst2.")[2] for key in keys}
    modules = ("adapter_norm_before", "adapter_down.0", "adapter_down.1", "adapter_up", "adapter_norm_after", "gate")
    assert suffixes == {f"{module}.{part}" for module in modules for part in ("weight", "bias")} | {"scaling"}


@pytest.mark.parametrize(
    ("name", "method", "key"),
    [(name, "lora", key) for name, key in LORA_KEYS_1X.items()]
    + [(name, "prefix", key) for name, key in PREFIX_KEYS_1X.items()],
)
def test_other_keys_are_those_of_1x(name, method, key, tmp_path):
    with_adapter(flexible, name, method).save_adapter(tmp_path, "a")
    weights = load_file(tmp_path / "adapter.safetensors")
    assert key.format("a") in weights
    assert not any(".pool." in other for other in weights)


def test_a_fused_projection_is_one_tensor_in_the_order_q_k_v(tmp_path):
    model = bare("gpt2")
    model.add_adapter("a", config=LoRAConfig(r=2, attn_matrices=["v", "q"], use_gating=True))
    for parameter in trained(model, "a").values():
        disturb(torch.nn.ParameterList([parameter]))
    model.save_adapter(tmp_path, "a")
    weights, live = load_file(tmp_path / "adapter.safetensors"), trained(model, "a")
    for part in ("lora_A", "lora_B", "gate.weight", "gate.bias"):
        parts = [live[f"h.0.attn.c_attn.{letter}.loras.a.{part}"] for letter in "qv"]
        assert torch.equal(weights[f"h.0.attn.c_attn.loras.a.{part}"], torch.cat(parts))


def test_the_table_of_names_has_a_row_for_every_bert():
    assert names.family_of("xlm-roberta") is names.BERT
    assert names.family_of("unheard-of") is names.PLAIN


def test_the_config_file(tmp_path):
    model = with_adapter(flexible, "bert", "lora")
    model.save_adapter(tmp_path / "one", "a", meta_dict={"task": "sst2", "name": "other"})
    found = settings(tmp_path / "one")
    assert list(found) == sorted(found)
    assert found == {
        "config": model.adapters_config.get("a").to_dict(),
        "hidden_size": 16,
        "model_class": "BertAdapterModel",
        "model_name": "",
        "model_type": "bert",
        "name": "a",
        "task": "sst2",
        "version": f"adapters.{adapters.__version__}",
    }
    meta = {"task": "sst2"}
    model.save_all_adapters(tmp_path / "all", meta_dict=meta)
    assert settings(tmp_path / "all" / "a")["config_id"] and meta == {"task": "sst2"}


@pytest.mark.parametrize("safe", [True, False])
def test_either_format_is_found_whatever_is_preferred(safe, tmp_path):
    saved = with_adapter(bare, "bert", "bottleneck")
    saved.save_adapter(tmp_path / "deep" / "er", "a", use_safetensors=safe)
    weights = "adapter.safetensors" if safe else "pytorch_adapter.bin"
    assert files(tmp_path / "deep" / "er") == sorted(["adapter_config.json", weights])
    for preferred in (True, False):
        loaded = bare()
        loaded.load_adapter(str(tmp_path / "deep" / "er"), use_safetensors=preferred)
        same(trained(saved, "a"), trained(loaded, "a"))


def test_a_save_in_the_other_format_leaves_no_old_weights(tmp_path):
    model = with_adapter(bare, "bert", "lora")
    model.save_adapter(tmp_path, "a")
    model.save_adapter(tmp_path, "a", use_safetensors=False)
    assert files(tmp_path) == ["adapter_config.json", "pytorch_adapter.bin"]


@pytest.mark.parametrize("method", METHODS)
def test_load_as_renames(method, tmp_path):
    saved = with_adapter(bare, "bert", method, "a")
    saved.save_adapter(tmp_path, "a")
    loaded = bare()
    loaded.add_adapter("ab", config="lora")
    other = {key: value.clone() for key, value in trained(loaded, "ab").items()}
    assert loaded.load_adapter(tmp_path, load_as="new-name") == "new-name"
    renamed = {key.replace(".new-name.", ".a."): value for key, value in trained(loaded, "new-name").items()}
    same(trained(saved, "a"), renamed)
    same(other, trained(loaded, "ab"))


def test_names_are_compared_as_a_whole(tmp_path):
    model = bare()
    for name in ("a", "ab", "adapters"):
        model.add_adapter(name, config=METHODS["lora"])
    model.save_adapter(tmp_path, "a")
    assert all(".loras.a." in key for key in load_file(tmp_path / "adapter.safetensors"))
    model.save_adapter(tmp_path, "adapters")
    fresh = bare()
    fresh.load_adapter(tmp_path, load_as="a")
    same(
        {key.replace(".adapters.", ".a."): value for key, value in trained(model, "adapters").items()},
        trained(fresh, "a"),
    )


def test_overwriting_with_an_equal_config_keeps_the_parameters(tmp_path):
    saved = with_adapter(bare, "bert", "bottleneck")
    saved.save_adapter(tmp_path, "a")
    model = bare()
    model.add_adapter("a", config=METHODS["bottleneck"])
    model.set_active_adapters("a")
    before = {key: id(value) for key, value in trained(model, "a").items()}
    model.load_adapter(tmp_path)
    assert before == {key: id(value) for key, value in trained(model, "a").items()}
    same(trained(saved, "a"), trained(model, "a"))
    assert model.active_adapters == Stack("a")


def test_overwriting_with_another_config_replaces(tmp_path):
    saved = with_adapter(bare, "bert", "bottleneck")
    saved.save_adapter(tmp_path, "a")
    model = bare()
    model.add_adapter("b", config="lora")
    model.add_adapter("a", config="lora")
    model.set_active_adapters(Stack("b", "a"))
    model.load_adapter(tmp_path)
    same(trained(saved, "a"), trained(model, "a"))
    assert model.adapters_config.get("a") == saved.adapters_config.get("a")
    assert model.active_adapters == Stack("b", "a")


def test_a_fused_adapter_is_overwritten_by_one_that_fits_only(tmp_path):
    model = with_adapter(bare, "bert", "bottleneck")
    model.add_adapter("b", config=METHODS["bottleneck"])
    model.add_adapter_fusion(["a", "b"], set_active=True)
    other = bare()
    other.add_adapter("a", config="lora")
    other.save_adapter(tmp_path / "lora", "a")
    other.add_adapter("a", config=METHODS["bottleneck"].replace(reduction_factor=2), overwrite_ok=True)
    other.save_adapter(tmp_path / "wide", "a")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for call in (
        lambda: model.load_adapter(tmp_path / "lora"),
        lambda: model.add_adapter("a", config="lora", overwrite_ok=True),
    ):
        with pytest.raises(
            AdapterError, match=r"overwriting 'a': it is fused in 'a,b'.* delete_adapter_fusion\('a,b'\)"
        ):
            call()
        same(before, model.state_dict())
        assert model.active_adapters == Fuse("a", "b") and [*model.adapters_config] == ["a", "b"]
    model.load_adapter(tmp_path / "wide")
    assert model.adapters_config.get("a")["reduction_factor"] == 2
    model.delete_adapter_fusion("a,b")
    model.load_adapter(tmp_path / "lora")


def test_leave_out_adds_layers_to_the_saved_ones(tmp_path):
    saved = bare()
    saved.add_adapter("a", config=ConfigUnion(LoRAConfig(r=2), METHODS["bottleneck"]))
    saved.save_adapter(tmp_path, "a")
    model, info = bare(), {}
    model.load_adapter(tmp_path, leave_out=[0], loading_info=info)
    configs = model.adapters_config.get("a").configs
    assert [config.leave_out for config in configs] == [[0], [0]]
    assert not any(".layer.0." in key for key in trained(model, "a"))
    assert info["missing_keys"] == [] and any(".layer.0." in key for key in info["unexpected_keys"])


def test_what_a_file_lacks_or_has_too_much_is_reported(tmp_path):
    with_adapter(flexible, "bert", "lora").save_adapter(tmp_path, "a")
    weights = load_file(tmp_path / "adapter.safetensors")
    lost = next(iter(weights))
    weights["bert.elsewhere.loras.a.lora_A"] = weights.pop(lost)
    save_file(weights, tmp_path / "adapter.safetensors")
    info = {"missing_keys": ["before"]}
    with pytest.warns(UserWarning, match="1 tensors are not in the file .* and 1 tensors in the file have no place"):
        flexible().load_adapter(tmp_path, loading_info=info)
    assert info == {"missing_keys": ["before", lost], "unexpected_keys": ["bert.elsewhere.loras.a.lora_A"]}


def test_families_with_one_prefix_exchange_adapters(tmp_path):
    saved = with_adapter(flexible, "roberta", "bottleneck")
    saved.save_adapter(tmp_path / "with", "a")
    torch.manual_seed(1)
    same_size = {key: value for key, value in config("roberta").to_dict().items() if key != "model_type"}
    other = AutoAdapterModel.from_config(XLMRobertaConfig.from_dict(same_size))
    other.load_adapter(tmp_path / "with")
    same(trained(saved, "a"), trained(other, "a"))


def test_set_active(tmp_path):
    with_adapter(flexible, "bert", "lora").save_adapter(tmp_path, "a")
    model = flexible()
    model.load_adapter(tmp_path, set_active=True)
    assert model.active_adapters == Stack("a")
    model.set_active_adapters(None)
    model.load_adapter(tmp_path, set_active=True)
    assert model.active_adapters == Stack("a")


def test_weights_take_the_models_dtype(tmp_path):
    with_adapter(bare, "bert", "bottleneck").save_adapter(tmp_path, "a")
    model = bare().to(torch.bfloat16)
    model.load_adapter(tmp_path)
    assert {value.dtype for value in trained(model, "a").values()} == {torch.bfloat16}


# --- old formats ------------------------------------------------------------------------------------------------------


def test_version_1_folders(tmp_path):
    """Containers named for the kind of adapter, no version, an activation under its old name, settings of the day."""
    model = bare()
    model.add_adapter("a", config=BnConfig(True, True, 4, "gelu_new"))
    model.save_adapter(tmp_path, "a", use_safetensors=False)
    file = tmp_path / "pytorch_adapter.bin"
    weights = torch.load(file, weights_only=True)
    old = {
        "attention.output.adapters": "attention.output.attention_text_task_adapters",
        "output.adapters": "output.layer_text_task_adapters",
    }
    for new, former in old.items():
        weights = {re.sub(rf"(layer\.\d\.){new}", rf"\g<1>{former}", key): value for key, value in weights.items()}
    torch.save(weights, file)
    full = settings(tmp_path)
    full["config"] |= {"non_linearity": "gelu", "new_attention_norm": False, "attention_type": "sent-lvl-dynamic"}
    full["config"] |= {"invertible_adapter": {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}}
    full["type"] = "text_task"
    del full["version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(full))
    loaded = bare()
    with pytest.warns(UserWarning, match="former version are ignored: 'new_attention_norm' and 'attention_type'"):
        loaded.load_adapter(tmp_path)
    assert loaded.adapters_config.get("a") == model.adapters_config.get("a").replace(inv_adapter_reduction_factor=2)
    same(trained(model, "a"), trained(loaded, "a"))


@pytest.mark.parametrize(
    ("version", "gated", "alpha"),
    [
        ("adapters.1.0.1", False, 2),
        ("adapters.1.1.0", False, 16),
        ("3.2.1", False, 16),
        ("adapters.1.3.0", True, 2),
        ("3.2.1", True, 2),
        ("adapters.2.0.0.dev0", True, 16),
    ],
)
def test_lora_scaling_that_former_versions_ignored(version, gated, alpha, tmp_path, recwarn):
    model = bare()
    model.add_adapter("a", config=LoRAConfig(r=2, alpha=16, use_gating=gated))
    model.save_adapter(tmp_path, "a")
    edit(tmp_path, version=version)
    loaded = bare()
    loaded.load_adapter(tmp_path)
    assert loaded.adapters_config.get("a").alpha == alpha
    assert ["ignored alpha" in str(warning.message) for warning in recwarn] == [True] * (alpha == 2)


@pytest.mark.parametrize(("flag", "keys"), [(True, True), (False, True), (True, False)])
def test_modules_after_the_cross_attention_of_a_bert_decoder(flag, keys, tmp_path):
    """1.x has them where `mh_adapter` is set, whatever `cross_adapter` says."""

    def decoder():
        torch.manual_seed(0)
        cross = {"is_decoder": True, "add_cross_attention": True}
        model = AutoModel.from_config(BertConfig.from_dict(config("bert").to_dict() | cross))
        adapters.init(model)
        return model

    saved = decoder()
    saved.add_adapter("a", config=BnConfig(True, True, 4, "relu", cross_adapter=keys))
    saved.save_adapter(tmp_path, "a")
    edit(tmp_path, config={**settings(tmp_path)["config"], "cross_adapter": flag}, version="adapters.1.3.0")
    assert any(".crossattention.output.adapters." in key for key in load_file(tmp_path / "adapter.safetensors")) is keys
    loaded = decoder()
    loaded.load_adapter(tmp_path)
    same(trained(saved, "a"), trained(loaded, "a"))


def test_the_aliases_of_prefixes_are_read(tmp_path):
    saved = with_adapter(bare, "bert", "prefix")
    saved.save_adapter(tmp_path, "a")
    weights = load_file(tmp_path / "adapter.safetensors")
    pool = {
        f"encoder.layer.{layer}.attention.self.prefix_tuning.pool.{key.removeprefix('prefix_tuning.')}": value.clone()
        for key, value in weights.items()
        if key.startswith("prefix_tuning.")
        for layer in range(2)
    }
    save_file(weights | pool, tmp_path / "adapter.safetensors")
    loaded, info = bare(), {}
    loaded.load_adapter(tmp_path, loading_info=info)
    same(trained(saved, "a"), trained(loaded, "a"))
    assert info == {"missing_keys": [], "unexpected_keys": []}


@pytest.mark.parametrize("lost", ["adapter_norm_before", "adapter_down.0"])
def test_one_name_of_an_adapters_own_norm_is_enough(lost, tmp_path):
    saved = with_adapter(bare, "bert", "bottleneck")
    saved.save_adapter(tmp_path, "a")
    weights = load_file(tmp_path / "adapter.safetensors")
    save_file({key: value for key, value in weights.items() if lost not in key}, tmp_path / "adapter.safetensors")
    loaded = bare()
    loaded.load_adapter(tmp_path)
    same(trained(saved, "a"), trained(loaded, "a"))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_saved_with_the_head_of_its_name(tmp_path):
    saved = with_adapter(flexible, "bert", "lora")
    for name in ("a", "ab"):
        saved.add_classification_head(name, num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    saved.save_adapter(tmp_path, "a")
    keys = {f"heads.a.{layer}.{part}" for layer in (1, 4) for part in ("weight", "bias")}
    assert load_file(tmp_path / "model_head.safetensors").keys() == keys
    model = flexible(seed=1)
    model.load_adapter(tmp_path, load_as="b")
    same(saved.heads["a"].state_dict(), model.heads["b"].state_dict())
    assert model.active_head is None and model.get_labels("b") == ["x", "y", "z"]
    model.load_adapter(tmp_path, load_as="c", set_active=True, num_labels=3)
    assert model.active_head == "c" and model.get_labels() == ["LABEL_0", "LABEL_1", "LABEL_2"]
    model.load_adapter(tmp_path, load_as="d", with_head=False)
    assert "d" not in model.heads
    saved.save_adapter(tmp_path / "alone", "a", with_head=False)
    assert files(tmp_path / "alone") == ["adapter.safetensors", "adapter_config.json"]


def test_the_head_of_an_earlier_save_is_not_left_in_the_folder(tmp_path):
    model = with_adapter(flexible, "bert", "lora")
    for name in ("a", "ab"):
        model.add_classification_head(name, num_labels=3)
    model.save_adapter(tmp_path, "a")
    assert len(files(tmp_path)) == 4
    model.save_adapter(tmp_path, "a", with_head=False, use_safetensors=False)
    assert files(tmp_path) == ["adapter_config.json", "pytorch_adapter.bin"]
    model.save_head(tmp_path, "ab")
    model.save_adapter(tmp_path, "a", with_head=False)
    assert flexible().load_head(tmp_path)[1] == "ab"  # another one's


def test_heads_of_other_names_in_a_file_are_passed_over(tmp_path):
    """1.x wrote those whose names begin the same."""
    model = flexible()
    model.add_tagging_head("a", num_labels=3)
    model.save_head(tmp_path, "a")
    weights = load_file(tmp_path / "model_head.safetensors")
    save_file(weights | {"heads.ab.1.weight": torch.ones(5, 16)}, tmp_path / "model_head.safetensors")
    loaded, info = flexible(seed=1), {}
    assert loaded.load_head(tmp_path) == (str(tmp_path), "a")
    same(model.heads["a"].state_dict(), loaded.heads["a"].state_dict())
    assert loaded.active_head == "a" and info == {}


def test_loading_over_a_head(tmp_path):
    saved = flexible()
    saved.add_classification_head("a", num_labels=3)
    saved.save_head(tmp_path, "a")
    model = flexible(seed=1)
    model.add_classification_head("a", num_labels=3)
    first = model.heads["a"]
    model.load_head(tmp_path)
    assert model.heads["a"] is first
    same(saved.heads["a"].state_dict(), first.state_dict())
    model.add_classification_head("a", num_labels=2, overwrite_ok=True)
    model.load_head(tmp_path)
    same(saved.heads["a"].state_dict(), model.heads["a"].state_dict())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_tied_head_never_changes_the_embeddings(name, tmp_path):
    saved = flexible(name)
    add = {"bert": "add_masked_lm_head", "gpt2": "add_causal_lm_head", "t5": "add_seq2seq_lm_head"}
    getattr(saved, add[name])("lm")
    saved.save_head(tmp_path, "lm")
    other = flexible(name, seed=1)
    embeddings = other.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="differs from the embeddings that it is tied to"):
        other.load_head(tmp_path)
    assert torch.equal(other.get_input_embeddings().weight, embeddings)
    equal = flexible(name, seed=0)
    equal.load_head(tmp_path)
    same(saved.heads["lm"].state_dict(), equal.heads["lm"].state_dict())


def test_a_large_model_is_no_reason_to_refuse_an_adapter(tmp_path):
    """The pass that finds the places, on meta tensors of the model's sizes, counts for nothing."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for words in (100, 50_000):
        model = AutoModel.from_config(BertConfig(vocab_size=words, **sizes))
        adapters.init(model)
        if words == 100:
            model.add_adapter("a", "seq_bn")
            model.save_adapter(tmp_path, "a")
        else:
            model.load_adapter(tmp_path)
    assert "a" in model.adapters_config


def classifier(seed=0, labels=3):
    torch.manual_seed(seed)
    names = {index: f"label {index}" for index in range(labels)}
    settings = config("bert").to_dict() | {"num_labels": labels, "id2label": names}
    settings |= {"label2id": {label: index for index, label in names.items()}}
    model = BertForSequenceClassification(BertConfig.from_dict(settings)).eval()
    adapters.init(model)
    return model


def test_the_head_of_a_static_model(tmp_path):
    saved = classifier()
    saved.add_adapter("a", config="lora")
    saved.save_adapter(tmp_path, "a")
    assert load_file(tmp_path / "model_head.safetensors").keys() == {"classifier.weight", "classifier.bias"}
    found = settings(tmp_path, "head_config.json")
    assert (found["config"], found["name"], found["num_labels"]) == (None, None, 3)
    model = classifier(seed=1)
    model.config.id2label, model.config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    model.load_adapter(tmp_path)
    same(saved.classifier.state_dict(), model.classifier.state_dict())
    assert model.config.label2id == saved.config.label2id and model.config.id2label == saved.config.id2label
    model.load_adapter(tmp_path, id2label={0: "x", 1: "y", 2: "z"})
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}


def test_a_static_language_model_keeps_its_embeddings(tmp_path):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(BertForMaskedLM(config("bert")).eval())
        adapters.init(models[-1])
        disturb(models[-1].cls)
    saved, other = models
    saved.add_adapter("a", config="lora")
    saved.save_adapter(tmp_path, "a")
    embeddings = other.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="differs from the embeddings"):
        other.load_adapter(tmp_path)
    assert torch.equal(other.get_input_embeddings().weight, embeddings)
    assert torch.equal(other.cls.predictions.bias, saved.cls.predictions.bias)


def test_a_head_for_another_class_is_left_out(tmp_path):
    saved = classifier()
    saved.add_adapter("a", config="lora")
    saved.save_adapter(tmp_path, "a")
    torch.manual_seed(0)
    other = BertForMaskedLM(config("bert"))
    adapters.init(other)
    with pytest.warns(UserWarning, match="does not match current model class"):
        assert other.load_adapter(tmp_path) == "a"
    assert bare().load_adapter(tmp_path) == "a"


# --- fusions and setups -----------------------------------------------------------------------------------------------


def fused(make=flexible, seed=0, fuse=None):
    model = make(seed=seed)
    for name in ("a", "b", "c"):
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
    if fuse is not None:
        model.add_adapter_fusion(fuse)
        for key, parameter in model.named_parameters():
            if "adapter_fusion_layer" in key:
                disturb(torch.nn.ParameterList([parameter]))
    return model


def fusion_weights(model, name):
    return {key: value for key, value in model.base_model.named_parameters() if f".adapter_fusion_layer.{name}." in key}


@pytest.mark.parametrize("fuse", [Fuse("a", "b"), Fuse("b", "c", name="mine")], ids=str)
@pytest.mark.parametrize(("source", "target"), [("flexible", "bare"), ("bare", "flexible"), ("flexible", "flexible")])
def test_fusions(source, target, fuse, tmp_path):
    saved = fused(MAKERS[source], fuse=fuse)
    saved.save_adapter_fusion(tmp_path, fuse)
    assert files(tmp_path) == ["adapter_fusion_config.json", "model_adapter_fusion.safetensors"]
    found = settings(tmp_path, "adapter_fusion_config.json")
    assert (found["name"], found["adapter_names"]) == (fuse.name, [*fuse.children])
    model = fused(MAKERS[target], seed=1)
    assert model.load_adapter_fusion(tmp_path, set_active=True) == fuse.name
    same(fusion_weights(saved, fuse.name), fusion_weights(model, fuse.name))
    assert model.active_adapters.name == fuse.name
    model.load_adapter_fusion(tmp_path, load_as="again")
    again = {key.replace(".again.", f".{fuse.name}."): value for key, value in fusion_weights(model, "again").items()}
    same(fusion_weights(saved, fuse.name), again)


def test_fusion_keys_are_those_of_1x(tmp_path):
    saved = fused(fuse=Fuse("a", "b"))
    saved.save_adapter_fusion(tmp_path, "a,b")
    parts = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    expected = {f"bert.encoder.layer.{n}.output.adapter_fusion_layer.a,b.{part}" for n in (0, 1) for part in parts}
    assert load_file(tmp_path / "model_adapter_fusion.safetensors").keys() == expected


def test_fusion_files_of_1x(tmp_path):
    """They may hold fusions whose names begin the same, and before version 1.0 do not list the adapters."""
    saved = fused(fuse=Fuse("a", "b"))
    saved.add_adapter_fusion(Fuse("a", "b", "c"))
    saved.save_adapter_fusion(tmp_path, ["a", "b"])
    weights = load_file(tmp_path / "model_adapter_fusion.safetensors")
    foreign = {key.replace(".a,b.", ".a,b,c."): value.clone() for key, value in weights.items()}
    save_file(weights | foreign, tmp_path / "model_adapter_fusion.safetensors")
    edit(tmp_path, "adapter_fusion_config.json", adapter_names=None)
    model, info = fused(seed=1), {}
    model.load_adapter_fusion(tmp_path, loading_info=info)
    same(fusion_weights(saved, "a,b"), fusion_weights(model, "a,b"))
    assert info == {"missing_keys": [], "unexpected_keys": []}


def test_save_all(tmp_path):
    model = fused(fuse=Fuse("a", "b"))
    model.add_adapter_fusion(Fuse("b", "c", name="mine"), "static")
    model.add_classification_head("a,b")
    model.save_all_adapters(tmp_path)
    model.save_all_adapter_fusions(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a,b", "b", "c", "mine"]
    assert settings(tmp_path / "mine", "adapter_fusion_config.json")["config_id"]
    model.save_adapter_fusion(tmp_path / "head", "mine", with_head="a,b")
    fresh = fused(seed=1)
    fresh.load_adapter_fusion(tmp_path / "head")
    same(model.heads["a,b"].state_dict(), fresh.heads["a,b"].state_dict())


@pytest.mark.parametrize(
    "setup",
    ["a", Stack("a", Fuse("b", "c", name="mine")), Fuse("b", "c", name="mine"), Parallel("a", Stack("b", "c"))],
    ids=str,
)
@pytest.mark.parametrize("heads", [None, "h", ["h", "i"], BatchSplit("h", "i", batch_sizes=[1, 2])], ids=str)
def test_setups(setup, heads, tmp_path):
    saved = fused(fuse=Fuse("b", "c", name="mine"))
    for name in ("h", "i"):
        saved.add_tagging_head(name)
    saved.save_adapter_setup(tmp_path, setup, head_setup=heads)
    model = flexible(seed=1)
    found = model.load_adapter_setup(tmp_path, set_active=True)
    assert found == (setup if setup != "a" else Stack("a"), heads)
    assert model.active_adapters == found[0] and (heads is None or model.active_head == heads)
    for name in found[0].flatten():
        same(trained(saved, name), trained(model, name))
    if "Fuse" in str(setup):
        same(fusion_weights(saved, "mine"), fusion_weights(model, "mine"))


def test_the_setup_of_a_static_model(tmp_path):
    saved = classifier()
    saved.add_adapter("a", config="lora")
    saved.save_adapter_setup(tmp_path, "a", head_setup=True)
    model = classifier(seed=1)
    assert model.load_adapter_setup(tmp_path) == (Stack("a"), True)
    same(saved.classifier.state_dict(), model.classifier.state_dict())
    assert model.active_adapters is None


# --- custom weights ---------------------------------------------------------------------------------------------------


class PoolerLoader(WeightsLoader):
    def filter_func(self, adapter_name):
        return lambda key: ".pooler." in f".{key}"

    def rename_func(self, old_name, new_name):
        return lambda key: key


@pytest.mark.parametrize("safe", [True, False])
def test_custom_weights(safe, tmp_path):
    def loader(model):
        return PoolerLoader(model, "pooler.bin", "pooler_config.json", safe, "pooler.safetensors")

    saved = flexible()
    saved.add_adapter("a")
    saved.save_adapter(tmp_path, "a", custom_weights_loaders=[loader(saved)])
    weights = "pooler.safetensors" if safe else "pooler.bin"
    assert {"pooler_config.json", weights} < set(files(tmp_path))
    model, info = bare(seed=1), {}
    model.load_adapter(tmp_path, load_as="b", custom_weights_loaders=[loader(model)], loading_info=info)
    same(saved.bert.pooler.state_dict(), model.pooler.state_dict())
    assert info == {"missing_keys": [], "unexpected_keys": []}
