"""Folders as adapter-transformers 1 to 3 wrote them: built by hand, key by key and setting by setting."""

import json
import re

import pytest
import torch
from transformers import BertConfig

from adapters import AutoAdapterModel, BnConfig, Fuse, LoRAConfig, PrefixTuningConfig

CONFIG = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TOKENS = torch.tensor([[3, 5, 7], [2, 4, 6]])
ATTENTION, OUTPUT = "bert.encoder.layer.{}.attention.output.{}", "bert.encoder.layer.{}.output.{}"
# The settings of a bottleneck in version 1, in the order of its class; pfeiffer and houlsby differ in two of them.
VERSION_1 = {
    "original_ln_before": True, "original_ln_after": True, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "ln_before": False, "ln_after": False, "mh_adapter": False,
    "output_adapter": True, "non_linearity": "relu", "reduction_factor": 8, "new_attention_norm": False,
    "attention_type": "sent-lvl-dynamic", "invertible_adapter": None,
}  # fmt: skip
VERSION_3 = {
    key: value
    for key, value in VERSION_1.items()
    if key not in ("new_attention_norm", "attention_type", "invertible_adapter")
} | {"inv_adapter": None, "inv_adapter_reduction_factor": None, "cross_adapter": False, "leave_out": [],
     "scaling": 1.0, "is_parallel": False, "phm_layer": False, "use_gating": False}  # fmt: skip
PFEIFFER, HOULSBY = {"mh_adapter": False}, {"mh_adapter": True, "non_linearity": "swish", "residual_before_ln": True}
NICE = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}


def model():
    torch.manual_seed(0)
    return AutoAdapterModel.from_config(BertConfig(**CONFIG)).eval()


def write(folder, config, weights, name="task", version=None, **more):
    folder.mkdir()
    full = {"config": config, "hidden_size": 16, "model_type": "bert", "name": name, **more}
    full |= {"model_class": "BertModelWithHeads", "model_name": "bert-base-uncased"}
    full |= {} if version is None else {"version": version}
    (folder / "adapter_config.json").write_text(json.dumps(full))
    torch.save(weights, folder / "pytorch_adapter.bin")


def bottleneck(place, container, name="task"):
    source = torch.Generator().manual_seed(3)
    shapes = {"adapter_down.0.weight": (2, 16), "adapter_down.0.bias": (2,)}
    shapes |= {"adapter_up.weight": (16, 2), "adapter_up.bias": (16,)}
    return {
        f"{place.format(layer, container)}.{name}.{key}": torch.randn(shape, generator=source)
        for layer in (0, 1)
        for key, shape in shapes.items()
    }


def invertible(container, name="task"):
    shapes = {f"{net}.{number}.{kind}": shape for net in "FG"
              for number, rows, columns in ((0, 4, 8), (2, 8, 4))
              for kind, shape in (("weight", (rows, columns)), ("bias", (rows,)))}  # fmt: skip
    return {f"bert.{container}.{name}.{key}": torch.rand(shape) / 4 for key, shape in shapes.items()}


KINDS = {
    # identifier, version, type: what is before the adapter's name after each place, and in which form its config is
    "pfeiffer 1, task": (None, "text_task", PFEIFFER, "layer_text_task_adapters", "attention_text_task_adapters"),
    "houlsby 1, task": (None, "text_task", HOULSBY, "layer_text_task_adapters", "attention_text_task_adapters"),
    "pfeiffer 1, lang": (None, "text_lang", PFEIFFER, "layer_text_lang_adapters", "attention_text_lang_adapters"),
    "houlsby+inv 1, lang": (None, "text_lang", HOULSBY, "layer_text_lang_adapters", "attention_text_lang_adapters"),
    "pfeiffer 2": ("2.3.0", None, PFEIFFER, "adapters", "adapters"),
    "houlsby+inv 3": ("3.2.1", None, HOULSBY, "adapters", "adapters"),
}


@pytest.mark.filterwarnings("ignore:.*settings of a former version are ignored")
@pytest.mark.parametrize("kind", KINDS)
def test_bottlenecks(kind, tmp_path):
    version, former_type, settings, output, attention = KINDS[kind]
    weights = bottleneck(OUTPUT, output)
    if settings["mh_adapter"]:
        weights |= bottleneck(ATTENTION, attention)
    config = (VERSION_1 if version is None else VERSION_3) | settings
    if "+inv" in kind or (former_type == "text_lang"):
        weights |= invertible("invertible_lang_adapters" if former_type else "invertible_adapters")
        config |= (
            {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2} if version else {"invertible_adapter": NICE}
        )
    more = {"config_id": "9076f36a74755ac4"} | ({"type": former_type} if former_type else {})
    write(tmp_path / "old", config, weights, version=version, **more)
    info, loaded = {}, model()
    assert loaded.load_adapter(tmp_path / "old", loading_info=info, set_active=True) == "task"
    assert info == {"missing_keys": [], "unexpected_keys": []}
    found = loaded.adapters_config.get("task")
    assert isinstance(found, BnConfig)
    assert (found.mh_adapter, found.non_linearity) == (settings["mh_adapter"], settings.get("non_linearity", "relu"))
    assert found.inv_adapter == ("nice" if any("invertible" in key for key in weights) else None)
    state = {re.sub(r"(attention_|layer_|invertible_)?(text_task_|text_lang_|lang_)?adapters\.", "", key): value
             for key, value in loaded.state_dict().items()}  # fmt: skip
    assert sum(value.numel() for key, value in state.items() if "task." in key) == sum(
        map(torch.numel, weights.values())
    )
    assert torch.isfinite(loaded(TOKENS)[0]).all()


def test_lora_of_version_3_keeps_its_scale(tmp_path):
    weights = {
        f"bert.encoder.layer.{layer}.attention.self.{place}.loras.task.lora_{side}": torch.rand(shape)
        for layer in (0, 1)
        for place in ("query", "value")
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    config = {"architecture": "lora", "r": 2, "alpha": 8, "attn_matrices": ["q", "v"], "selfattn_lora": True}
    write(tmp_path / "old", config | {"composition_mode": "add", "init_weights": "lora"}, weights, version="3.0.1")
    loaded = model()
    loaded.load_adapter(tmp_path / "old")
    assert loaded.adapters_config.get("task") == LoRAConfig(r=2, alpha=8)


def test_prefixes_of_version_3_are_there_for_each_layer(tmp_path):
    shared = {
        f"self_prefix.{key}": torch.rand(shape)
        for key, shape in {"wte.weight": (3, 16), "control_trans.0.weight": (5, 16), "control_trans.0.bias": (5,),
                           "control_trans.2.weight": (64, 5), "control_trans.2.bias": (64,)}.items()
    }  # fmt: skip
    places = ["bert.prefix_tuning"]
    places += [f"bert.encoder.layer.{layer}.attention.self.prefix_tuning.pool" for layer in (0, 1)]
    weights = {f"{place}.prefix_tunings.task.{key}": value for place in places for key, value in shared.items()}
    config = {"architecture": "prefix_tuning", "encoder_prefix": True, "cross_prefix": True, "leave_out": []}
    config |= {"flat": False, "prefix_length": 3, "bottleneck_size": 5, "non_linearity": "tanh", "dropout": 0.0}
    write(tmp_path / "old", config, weights, version="3.1.0")
    info, loaded = {}, model()
    loaded.load_adapter(tmp_path / "old", loading_info=info)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert loaded.adapters_config.get("task") == PrefixTuningConfig(prefix_length=3, bottleneck_size=5)


def test_a_head_of_a_model_with_heads(tmp_path):
    write(tmp_path / "old", VERSION_1 | PFEIFFER, bottleneck(OUTPUT, "layer_text_task_adapters"), type="text_task")
    config = {"head_type": "classification", "num_labels": 2, "layers": 2, "activation_function": "tanh"}
    full = {
        "config": config | {"label2id": {"no": 0, "yes": 1}},
        "hidden_size": 16,
        "model_class": "BertModelWithHeads",
    }
    (tmp_path / "old/head_config.json").write_text(json.dumps(full | {"model_type": "bert", "name": "task"}))
    weights = {"heads.task.1.weight": torch.rand(16, 16), "heads.task.1.bias": torch.rand(16)}
    weights |= {"heads.task.4.weight": torch.rand(2, 16), "heads.task.4.bias": torch.rand(2)}
    torch.save(weights, tmp_path / "old/pytorch_model_head.bin")
    loaded = model()
    with pytest.warns(UserWarning, match="settings of a former version are ignored"):
        loaded.load_adapter(tmp_path / "old", set_active=True)
    assert loaded.get_labels("task") == ["no", "yes"]
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert loaded(TOKENS).logits.shape == (2, 2)


def test_a_fusion_of_version_1(tmp_path):
    (tmp_path / "old").mkdir()
    config = {"key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True}
    config |= {"residual_before": False, "temperature": False, "value_before_softmax": True, "value_initialized": True}
    full = {
        "config": config,
        "hidden_size": 16,
        "model_class": "BertModelWithHeads",
        "model_type": "bert",
        "name": "a,b",
    }
    (tmp_path / "old/adapter_fusion_config.json").write_text(json.dumps(full))
    shapes = {"query.weight": (16, 16), "query.bias": (16,), "key.weight": (16, 16), "key.bias": (16,)}
    weights = {
        f"bert.encoder.layer.{layer}.output.adapter_fusion_layer.a,b.{key}": torch.rand(shape)
        for layer in (0, 1)
        for key, shape in (shapes | {"value.weight": (16, 16)}).items()
    }
    torch.save(weights, tmp_path / "old/pytorch_model_adapter_fusion.bin")
    loaded, info = model(), {}
    for name in "ab":
        loaded.add_adapter(name, config="pfeiffer")
    assert loaded.load_adapter_fusion(tmp_path / "old", loading_info=info, set_active=True) == "a,b"
    assert info == {"missing_keys": [], "unexpected_keys": []}
    assert loaded.active_adapters == Fuse("a", "b")
    found = sorted(float(value.sum()) for key, value in loaded.state_dict().items() if ".a,b." in key)
    assert found == sorted(float(value.sum()) for value in weights.values())


@pytest.mark.parametrize(
    ("former", "name"),
    {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn", "scaled_parallel": "scaled_par_bn",
     "pfeiffer+inv": "seq_bn_inv", "houlsby+inv": "double_seq_bn_inv"}.items(),
)  # fmt: skip
def test_former_identifiers(former, name):
    loaded = model()
    for adapter in (former, name):
        loaded.add_adapter(f"{adapter}_", config=adapter)
    assert loaded.adapters_config.get(f"{former}_") == loaded.adapters_config.get(f"{name}_")
