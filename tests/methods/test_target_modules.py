"""Linear methods at modules chosen by their paths: ``target_modules``."""

import pytest
import torch
from tiny_models import MORE_METHODS, adapted, disturb, inputs, output
from transformers import AutoModelForSequenceClassification

import adapters
from adapters import AdapterError, BitFitConfig, ConfigError, LoRAConfig, Stack
from adapters.methods.linear_method import LinearMethodConfig
from adapters.sites import LinearSite

LINEAR_METHODS = {name: config for name, config in MORE_METHODS.items() if isinstance(config, LinearMethodConfig)}


def places(model, name: str = "x") -> set[str]:
    return {site.module_path for site, _ in model.adapter_sites.holding(name)}


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("llama", ["gate_proj"], {"layers.0.mlp.gate_proj", "layers.1.mlp.gate_proj"}),
        (
            "llama",
            r"layers\.1\.(self_attn|mlp)\.[gko]_?(proj|ate_proj)",
            {"layers.1.self_attn.k_proj", "layers.1.self_attn.o_proj"} | {"layers.1.mlp.gate_proj"},
        ),
        ("gpt2", ["c_attn"], {"h.0.attn.c_attn", "h.1.attn.c_attn"}),
        ("bert", ["pooler.dense", "0.output.dense"], {"pooler.dense", "encoder.layer.0.output.dense"}),
    ],
)
def test_which_modules_are_changed(architecture: str, targets, expected: set[str]) -> None:
    model = adapted(architecture)
    model.add_adapter("x", LoRAConfig(r=2, target_modules=targets))
    assert places(model) == expected


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "bart", "vit"])
def test_all_linear_is_every_map_once(architecture: str) -> None:
    model = adapted(architecture)
    model.add_adapter("x", LoRAConfig(r=2, target_modules="all-linear"))
    hosts = [site.host for site, _ in model.adapter_sites.holding("x")]
    found = [module for module in model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert len(hosts) == len(set(hosts))
    assert set(hosts) == set(found)


@pytest.mark.parametrize("name", LINEAR_METHODS)
def test_every_linear_method(name: str) -> None:
    """At the whole of a fused map, and at maps that have no role."""
    for architecture, targets in (("gpt2", ["c_attn"]), ("llama", ["gate_proj"])):
        model, batch = adapted(architecture), inputs(architecture)
        before = output(model, batch)
        model.add_adapter("x", LINEAR_METHODS[name].replace(target_modules=targets), set_active=True)
        disturb(model, "x")
        changed = output(model, batch)
        assert not torch.equal(changed, before)
        model.merge_adapter("x")
        torch.testing.assert_close(output(model, batch), changed, rtol=1e-4, atol=1e-4)
        model.delete_adapter("x")
        torch.testing.assert_close(output(model, batch), before, rtol=0, atol=0)


def classifier(architecture: str = "bert"):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(adapted(architecture).config).eval()
    return model


def test_the_classifier_and_the_embeddings(tmp_path) -> None:
    model, batch = classifier(), inputs("bert")
    adapters.init(model)
    model.add_adapter("x", LoRAConfig(r=2, target_modules=["classifier", "word_embeddings"]), set_active=True)
    assert places(model) == {"classifier", "embeddings.word_embeddings"}
    disturb(model, "x")
    expected = model(**batch).logits
    model.save_adapter(tmp_path, "x")
    other = classifier()
    adapters.init(other)
    other.load_adapter(tmp_path, set_active=True)
    torch.testing.assert_close(other(**batch).logits, expected, rtol=0, atol=0)


def test_the_head_is_found_if_the_base_model_came_first() -> None:
    model = classifier()
    adapters.init(model.base_model)
    model.base_model.add_adapter("x", LoRAConfig(r=2, target_modules="all-linear"))
    assert "classifier" not in places(model.base_model)
    adapters.init(model)
    model.add_adapter("y", LoRAConfig(r=2, target_modules=["classifier"]))
    assert places(model, "y") == {"classifier"}


def test_a_whole_map_and_its_slices_in_a_stack() -> None:
    """Changes add up, wherever they are noted."""
    model, batch = adapted("gpt2"), inputs("gpt2")
    model.add_adapter("whole", LoRAConfig(r=2, alpha=2, target_modules=["c_attn"]))
    model.add_adapter("slices", LoRAConfig(r=2, alpha=2, attn_matrices=["q", "k", "v"]))
    for name in ("whole", "slices"):
        disturb(model, name)
    plain = adapted("gpt2")
    with torch.no_grad():
        for site in model.adapter_sites.of(LinearSite):
            host = plain.get_submodule(site.host_path)
            for module in site.adapters.values():
                change = (module.lora_B @ module.lora_A * module.scale).T
                host.weight[:, site.start : site.start + site.outputs] += change
    model.set_active_adapters(Stack("whole", "slices"))
    torch.testing.assert_close(output(model, batch), output(plain, batch), rtol=1e-5, atol=1e-5)


def test_biases_by_path() -> None:
    model = adapted("bert")
    model.add_adapter("x", BitFitConfig(norms=False, target_modules=["pooler.dense", "query"]))
    assert places(model) == {"pooler.dense", *(f"encoder.layer.{layer}.attention.self.query" for layer in (0, 1))}


def test_layers_are_left_out_and_ranks_differ() -> None:
    model = adapted("llama")
    config = LoRAConfig(r=2, target_modules=["gate_proj", "q_proj"], leave_out=[0], rank_pattern={"gate_proj": 3})
    model.add_adapter("x", config)
    ranks = {site.module_path: module.rank for site, module in model.adapter_sites.holding("x")}
    assert ranks == {"layers.1.mlp.gate_proj": 3, "layers.1.self_attn.q_proj": 2}


def test_the_field_is_in_files_where_it_is_set() -> None:
    assert "target_modules" not in LoRAConfig().to_dict()
    assert LoRAConfig(target_modules=("q", "k")).to_dict()["target_modules"] == ["q", "k"]


@pytest.mark.parametrize("wrong", ["(", [], [""], [3], 3])
def test_what_is_no_pattern(wrong) -> None:
    for kind in (LoRAConfig, adapters.OFTConfig, BitFitConfig):
        with pytest.raises(ConfigError, match=r"target_modules.* is no pattern"):
            kind(target_modules=wrong)


@pytest.mark.parametrize("wrong", [["q_proj", "quarry"], "quarry", ["lm_head"]])
def test_what_fits_no_module(wrong) -> None:
    model = adapted("llama")
    with pytest.raises(AdapterError, match=r"fits no module that the method can sit at; such modules are 'layers.0"):
        model.add_adapter("x", adapters.OFTConfig(block_size=4, target_modules=wrong))
    assert not model.adapters_config.adapters


def test_embeddings_take_no_gate() -> None:
    model = adapted("bert")
    with pytest.raises(ConfigError, match=r"not possible at embeddings.word_embeddings"):
        model.add_adapter("x", LoRAConfig(use_gating=True, target_modules=["word_embeddings"]))
    assert not list(model.adapter_sites.holding("x"))


# --- (IA)³ at inputs, norms by path, prefixes that are counted --------------------------------------------------------

SCALED = LoRAConfig(
    r=1,
    alpha=2,
    composition_mode="scale",
    init_weights="ia3",
    target_modules=["v_proj", "down_proj"],
    scaled_inputs=["down_proj"],
)


def test_inputs_are_scaled() -> None:
    """W (alpha l * x) + b: alone, merged, and as a change in a block."""
    model, batch = adapted("llama"), inputs("llama")
    model.add_adapter("x", SCALED, set_active=True)
    disturb(model, "x")
    by_path = {site.module_path: module for site, module in model.adapter_sites.holding("x")}
    plain = adapted("llama")
    with torch.no_grad():
        for path, module in by_path.items():
            host = plain.get_submodule(path)
            host.weight *= 2 * (module.lora_A if "down" in path else module.lora_B)
    expected = output(plain, batch)
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-5, atol=1e-5)
    model.set_active_adapters(adapters.BatchSplit("x", None, batch_sizes=[2, 2]))
    torch.testing.assert_close(output(model, batch)[:2], expected[:2], rtol=1e-5, atol=1e-5)
    model.merge_adapter("x")
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_scaled_inputs_are_those_of_ia3_without_gates() -> None:
    with pytest.raises(ConfigError, match=r"scaled_inputs.*not possible with lora"):
        LoRAConfig(scaled_inputs=["down_proj"])
    with pytest.raises(ConfigError, match=r"use_gating=True.*not possible with scaled_inputs"):
        adapted("llama").add_adapter("x", SCALED.replace(use_gating=True))


def test_norms_by_path() -> None:
    model = adapted("llama")
    model.add_adapter("x", adapters.LNTuningConfig(target_modules=["input_layernorm"], leave_out=[0]))
    assert places(model) == {"layers.1.input_layernorm"}
    with pytest.raises(AdapterError, match="'layernorm' fits no module"):
        model.add_adapter("y", adapters.LNTuningConfig(target_modules=["layernorm"]))


def counted(length: int) -> adapters.PrefixTuningConfig:
    return adapters.PrefixTuningConfig(flat=True, prefix_length=length, shift_positions=True)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_prefixes_may_count_as_positions(architecture: str) -> None:
    """As if the ids of all positions were given; each row those of its own prefixes."""
    model, batch = adapted(architecture), inputs(architecture)
    rows, length = batch["input_ids"].shape
    for name, config in {"counted": counted(3), "plain": counted(3).replace(shift_positions=False)}.items():
        torch.manual_seed(0)
        model.add_adapter(name, config)
    ids = torch.arange(length).expand(rows, -1)
    model.set_active_adapters("plain")
    expected = output(model, batch | {"position_ids": ids + 3})
    model.set_active_adapters("counted")
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output(model, batch | {"position_ids": ids}), expected, rtol=1e-6, atol=1e-6)
    model.set_active_adapters(adapters.BatchSplit("counted", None, batch_sizes=[1, rows - 1]))
    torch.testing.assert_close(output(model, batch)[:1], expected[:1], rtol=1e-5, atol=1e-5)


def test_generation_counts_them_once() -> None:
    model = adapted("llama", head=True)
    model.add_adapter("x", counted(3), set_active=True)
    disturb(model, "x")
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    found = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert found[0].tolist() == found[1].tolist()


@pytest.mark.parametrize("architecture", ["t5", "roberta"])
def test_models_that_do_not_count_so(architecture: str) -> None:
    model = adapted(architecture)
    with pytest.raises(AdapterError, match="has no site for 'positions'"):
        model.add_adapter("x", counted(3))
    assert not model.adapters_config.adapters
