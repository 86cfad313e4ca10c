"""``adapters.describe`` and the command: what they say is what ``add_adapter`` does, and nothing changes."""

from xml.etree import ElementTree

import pytest
import torch
from foreign_models import INTERFACE, Rumpf
from transformers import AutoModel, BertConfig, BertModel, CLIPConfig, CLIPModel, MambaConfig, MambaModel, T5Config

import adapters
from adapters import AdapterError, LoRAConfig
from adapters.cli import main

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 48}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SIZE)),
    "mamba": lambda: MambaModel(MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=48)),
    "clip": lambda: CLIPModel(
        CLIPConfig(text_config=SIZE, vision_config={**SIZE, "image_size": 8, "patch_size": 4}, projection_dim=16)
    ),
    "t5": lambda: AutoModel.from_config(T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)),
}
TRIED = ["seq_bn", "lora", "prefix_tuning_flat", "prompt_tuning", "loreft", "seq_bn_inv", "ia3"]


@pytest.mark.parametrize("initialised", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_it_says_what_add_adapter_does_and_changes_nothing(name, initialised):
    model = MODELS[name]()
    if initialised:
        adapters.init(model)
    kind, state, random = type(model), dict(model.state_dict(keep_vars=True)), torch.get_rng_state()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found = adapters.describe(model, TRIED)
    after = model.state_dict(keep_vars=True)
    assert type(model) is kind and after.keys() == state.keys() and torch.equal(torch.get_rng_state(), random)
    assert all(after[key] is tensor for key, tensor in state.items())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    adapters.init(model)
    for row in found.methods:
        try:
            model.add_adapter(row.method, row.method)
        except AdapterError as error:
            assert (row.applies, row.reason) == (False, str(error))
        else:
            assert row.applies
            assert sum(count for _, count in row.places) == len(model.adapter_sites.holding(row.method))


def test_the_tree_has_equal_layers_as_one():
    text = str(adapters.describe(MODELS["bert"](), ["lora"]))
    assert "├── encoder.layer.0 … 2 (3 layers)" in text or "└── encoder.layer.0 … 2 (3 layers)" in text
    assert "attention.self.query" in text and "selfattn_lora (q)" in text
    assert text.splitlines()[-1] == f"{'lora':<20} yes   6 × selfattn_lora"


def test_why_a_method_does_not_apply():
    (row,) = adapters.describe(MODELS["mamba"](), ["prefix_tuning"]).methods
    assert not row.applies and "no attention or positions site" in row.reason and row.reason in str(row)


def test_by_default_every_kind_of_method_is_tried():
    rows = {row.method: row.applies for row in adapters.describe(MODELS["bert"]()).methods}
    assert {"seq_bn", "lora", "ia3", "prefix_tuning", "prompt_tuning", "loreft", "oft"} <= rows.keys()
    assert rows["lora"] and "pfeiffer" not in rows


def test_configurations_and_taken_names():
    model = MODELS["bert"]()
    adapters.init(model)
    model.add_adapter("lora", "seq_bn")
    (row,) = adapters.describe(model, ["lora"]).methods
    assert row.applies
    (row,) = adapters.describe(model, [LoRAConfig(leave_out=[0, 1, 2])]).methods
    assert (row.method, row.applies) == ("LoRAConfig", False)


def test_one_method_and_what_is_no_model():
    assert [row.method for row in adapters.describe(MODELS["bert"](), "lora").methods] == ["lora"]
    for wrong in (None, "bert-base-uncased", torch.nn.Linear(2, 2)):
        with pytest.raises(AdapterError, match="it is no transformers model"):
            adapters.describe(wrong)
    with pytest.raises(AdapterError, match=r"did you mean|Could not identify"):
        adapters.describe(MODELS["bert"](), ["loar"])


def test_the_picture(tmp_path):
    found = adapters.describe(MODELS["clip"](), ["lora", "prefix_tuning_flat"])
    found.save(tmp_path / "sites.svg")
    root = ElementTree.parse(tmp_path / "sites.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "CLIPModel" and [title for title, _ in found.groups] == [
        text for text in texts if text in dict(found.groups)
    ]
    bottom = max(float(element.get("y")) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert bottom < float(root.get("height"))
    with pytest.raises(AdapterError, match=r"ends with '\.svg'"):
        found.save(tmp_path / "sites.png")


def test_described_modules_of_torch():
    found = adapters.describe(Rumpf(), ["lora", "prefix_tuning"], interface=INTERFACE)
    assert [row.applies for row in found.methods] == [True, False]


def test_the_command(tmp_path, capsys):
    config = BertConfig(**SIZE)
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    main(["describe", str(tmp_path), "--save", str(tmp_path / "a.svg"), "--method", "lora", "--method", "seq_bn"])
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "BertModel" and shown.splitlines()[-1].startswith("seq_bn               yes")
    assert (tmp_path / "a.svg").exists()
    for wrong in (["describe", str(tmp_path / "nothing")], ["describe", str(tmp_path), "--method", "loar"], []):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "loar" in capsys.readouterr().err
