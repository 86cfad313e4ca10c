"""``AdapterModelInterface``: a model that the rules read wrongly, or not at all, works as its user describes it."""

import copy
import json
import pickle

import pytest
import torch
from foreign_models import INTERFACE, EigenConfig, EigenModel, Ganzes, Rumpf, attention_by_hand
from torch import nn
from transformers import BertConfig, BertModel

import adapters
from adapters import AdapterError, AdapterModelInterface, AdapterSetup, LoRAConfig, Parallel
from adapters.interface import AdapterMethod

IDS = torch.arange(3, 27).view(4, 6)
METHODS = ["lora", "seq_bn", "double_seq_bn", "loreft", "seq_bn_inv"]


@pytest.fixture(params=["module", "inside", "transformers"])
def model(request):
    torch.manual_seed(0)
    kinds = {"module": Rumpf, "inside": Ganzes, "transformers": lambda: EigenModel(EigenConfig())}
    found = kinds[request.param]().eval()
    before = first(found(IDS))
    base = {"base_model": "rumpf"} if request.param == "inside" else {}
    assert adapters.init(found, interface=AdapterModelInterface(**INTERFACE, **base)) is None
    assert torch.equal(first(found(IDS)), before)
    return found


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def disturbed(model, name):
    """Every parameter of an adapter is changed."""
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            nn.init.normal_(parameter.data, std=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_a_described_model_has_the_methods(model, method, tmp_path):
    plain = first(model(IDS))
    model.add_adapter("a", method)
    model.train_adapter("a")
    model.eval()
    disturbed(model, "a")
    adapted = first(model(IDS))
    assert not torch.equal(adapted, plain)
    adapted.sum().backward()
    trained = {key for key, parameter in model.base_model.named_parameters() if parameter.grad is not None}
    assert trained and all(".a." in key for key in trained)
    with AdapterSetup(None):
        assert torch.equal(first(model(IDS)), plain)
    model.save_adapter(tmp_path, "a")
    other = copy.deepcopy(model)
    other.delete_adapter("a")
    assert torch.equal(first(other(IDS)), plain)
    other.load_adapter(tmp_path, set_active=True)
    torch.testing.assert_close(first(other(IDS)), adapted)
    torch.testing.assert_close(first(pickle.loads(pickle.dumps(model))(IDS)), adapted)


def test_blocks_work_on_described_models(model):
    for name, method in (("a", "lora"), ("b", "seq_bn")):
        model.add_adapter(name, method)
        disturbed(model, name)
    single = {}
    for name in "ab":
        model.set_active_adapters(name)
        single[name] = first(model(IDS))
    model.set_active_adapters(Parallel("a", "b"))
    torch.testing.assert_close(first(model(IDS)), torch.cat([single["a"], single["b"]]))


@pytest.mark.parametrize("described", [False, True])
def test_the_exits_are_those_of_the_dataflow(described):
    model = EigenModel(EigenConfig()).eval()
    adapters.init(model, interface=INTERFACE if described else None)
    model.add_adapter("a", "double_seq_bn")
    exits = {site.sublayer.exit for site, _ in model.adapter_sites.holding("a")}
    layers = list(model.stapel)
    assert exits <= {part for layer in layers for part in (layer.blick, layer.denken)} and len(exits) == 4


def test_the_parts_of_a_fused_projection_of_an_own_layout_are_measured():
    model = Rumpf().eval()
    adapters.init(model, interface=INTERFACE)
    model.add_adapter("a", LoRAConfig(attn_matrices=["q"]), set_active=True)
    disturbed(model, "a")
    blick = model.stapel[0].blick
    strom = model.stapel[0].glatt_eins(model.woerter(IDS))
    (site, module), *_ = model.adapter_sites.holding("a")
    assert (site.part, site.host) == ("q", blick.wert_schluessel_frage)
    change = module.scale * strom @ module.lora_A.T @ module.lora_B.T
    with AdapterSetup(None):
        expected = attention_by_hand(blick, strom, change)
    torch.testing.assert_close(blick(strom), expected)


def test_what_no_pass_can_be_traced_through_is_taken_from_the_interface():
    class Wort(Rumpf):
        def forward(self, saetze):
            if len(saetze) != 4:
                raise RuntimeError("four rows, please")
            return super().forward(saetze)

    model = Wort().eval()
    adapters.init(model, interface=INTERFACE)
    model.add_adapter("a", "double_seq_bn", set_active=True)
    exits = [site.sublayer.exit for site, _ in model.adapter_sites.holding("a")]
    assert exits == [part for layer in model.stapel for part in (layer.blick.heraus, layer.denken.hinaus)]
    traced = Rumpf().eval()
    adapters.init(traced, interface=INTERFACE)
    traced.add_adapter("a", "double_seq_bn", set_active=True)
    traced.load_state_dict(model.state_dict())
    disturbed(model, "a")
    disturbed(traced, "a")
    torch.testing.assert_close(model(IDS), traced(IDS))


def test_the_interface_overrides_what_would_be_read():
    fields = {
        **INTERFACE,
        "model_embeddings": "embeddings.word_embeddings",
        "model_layers": "encoder.layer",
        "layer_self_attn": "attention",
        "attn_o_proj": "output.dense",
        "attn_qkv_proj": None,
        "attn_q_proj": "self.value",  # on purpose
        "attn_k_proj": "self.key",
        "attn_v_proj": "self.query",
        "layer_intermediate_proj": "intermediate.dense",
        "layer_output_proj": "output.dense",
        "layer_pre_self_attn": None,
        "layer_pre_ffn": None,
    }
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
    adapters.init(model, interface=fields)
    model.add_adapter("a", LoRAConfig(attn_matrices=["q"]))
    assert [site.host_path for site, _ in model.adapter_sites.holding("a")] == ["encoder.layer.0.attention.self.value"]


def test_it_is_saved_with_models_and_adapters(tmp_path):
    model = EigenModel(EigenConfig()).eval()
    adapters.init(model, interface=AdapterModelInterface(**INTERFACE))
    model.add_adapter("a", "seq_bn", set_active=True)
    disturbed(model, "a")
    model.save_adapter(tmp_path / "adapter", "a")
    model.save_all_adapters(tmp_path / "all")
    model.save_pretrained(tmp_path / "model")
    for folder in ("adapter", "all", "model"):
        content = json.loads((tmp_path / folder / "adapter_interface.json").read_text("utf-8"))
        assert content["interface"] == AdapterModelInterface(**INTERFACE).to_dict()
        assert content["model_type"] == "eigen" and content["version"].startswith("adapters.")
    loaded = adapters.load_model(tmp_path / "model", EigenModel).eval()
    assert loaded.adapter_interface == AdapterModelInterface(**INTERFACE)
    loaded.set_active_adapters("a")
    torch.testing.assert_close(loaded(IDS)[0], model(IDS)[0])
    fresh = EigenModel(EigenConfig()).eval()
    adapters.init(fresh, interface=tmp_path / "adapter")
    fresh.load_adapter(tmp_path / "adapter")
    assert list(fresh.adapters_config) == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_qkv_proj": None}, "give all of the first three or the last"),
        ({"attn_q_proj": "q"}, "give all of"),
        ({"adapter_methods": "lora"}, "it must be a list of names"),
        ({"model_embeddings": "worte"}, "'model_embeddings' is set to 'worte' but this value is not found in the base"),
        ({"model_layers": "stapel.9"}, "'model_layers' is set to"),
        ({"model_layers": "woerter"}, "must be a ModuleList"),
        (
            {"layer_self_attn": "augen"},
            "'layer_self_attn' is set to 'augen' but this value is not found in the model l",
        ),
        ({"layer_self_attn": None}, "'layer_self_attn' is set to None"),
        ({"attn_o_proj": None}, "'attn_o_proj' is set to None but this value is not found in the self-attention"),
        ({"attn_qkv_proj": "qkv"}, "'attn_qkv_proj' is set to 'qkv'"),
        ({"layer_output_proj": "glatt_zwei"}, "is a LayerNorm, no linear map"),
        ({"layer_ln_2": "nichts"}, "'layer_ln_2' is set to 'nichts'"),
        ({"base_model": "rumpf"}, "'base_model' is set to 'rumpf'"),
        ({"methoden": []}, "methoden"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = Rumpf()
    before = dict(vars(model)), type(model)
    with pytest.raises(AdapterError, match=message):
        adapters.init(model, interface={**INTERFACE, **change})
    assert (dict(vars(model)), type(model)) == before


def test_other_refusals(tmp_path):
    model = Rumpf()
    with pytest.raises(AdapterError, match="describe a module of torch with interface="):
        adapters.init(model)
    with pytest.raises(AdapterError, match=r"adapter_interface\.json"):
        adapters.init(model, interface=tmp_path)
    model.config = {"breite": 16}
    with pytest.raises(AdapterError, match="must be a PreTrainedConfig or not be there"):
        adapters.init(model, interface=INTERFACE)
    del model.config
    adapters.init(model, interface={**INTERFACE, "adapter_methods": ["lora"]})
    with pytest.raises(AdapterError, match="no 'bottleneck' among its adapter_methods, 'lora'"):
        model.add_adapter("a", "seq_bn")
    with pytest.raises(AdapterError, match="save its state_dict"):
        model.save_pretrained(tmp_path)
    assert not model.supports_adapter("bottleneck") and model.supports_adapter("lora")


def test_the_methods_of_a_configuration():
    methods = {
        "seq_bn": ["bottleneck"],
        "seq_bn_inv": ["invertible", "bottleneck"],
        "unipelt": ["prefix_tuning", "bottleneck", "lora"],
        "mtl_lora": ["mtl_lora"],
    }
    for name, expected in methods.items():
        assert AdapterMethod.get_from_config(adapters.AdapterConfig.load(name)) == expected
