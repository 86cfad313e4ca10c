"""``modules``: a method sits in the chosen parts of a composite model and acts there; files are as before."""

import json

import pytest
import torch
from tiny_models import disturb
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
)

import adapters
from adapters import AdapterConfig, AdapterError, ConfigError, LoRAConfig, SeqBnConfig
from adapters.configuration.registry import ARCHITECTURES

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZE, "vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SIZE, "image_size": 8, "patch_size": 4}
HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 24}
IDS = torch.arange(3, 27).view(4, 6)
IMAGES = torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8)


def clip():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def llava():
    text = {**TEXT, "model_type": "llama", "num_key_value_heads": 2}
    vision = {**VISION, "model_type": "clip_vision_model"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=47))


def whisper():
    sizes = {f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in HALF.items()}
    text = {key: value for key, value in TEXT.items() if key not in SIZE}
    return WhisperModel(
        WhisperConfig(
            d_model=16, num_mel_bins=8, max_source_positions=8, max_target_positions=16, decoder_start_token_id=1,
            **sizes, **text,
        )
    )  # fmt: skip


def encoder_decoder():
    decoder = BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), decoder))


WITH_IMAGE = torch.cat([torch.full((4, 4), 47), IDS], 1)
MODELS = {
    "clip": (clip, {"input_ids": IDS, "pixel_values": IMAGES}, {"text": "text_model", "vision": "vision_model"}),
    "llava": (
        llava,
        {"input_ids": WITH_IMAGE, "pixel_values": IMAGES},
        {"text": "language_model", "vision": "vision_tower"},
    ),
    "whisper": (
        whisper,
        {"input_features": torch.ones(4, 8, 16), "decoder_input_ids": IDS},
        {"encoder": "encoder", "decoder": "decoder"},
    ),
    "encoder_decoder": (
        encoder_decoder,
        {"input_ids": IDS, "decoder_input_ids": IDS},
        {"encoder": "encoder", "decoder": "decoder"},
    ),
}
CASES = [(name, part) for name, (_, _, parts) in MODELS.items() for part in parts]
METHODS = ["seq_bn", "lora", "ia3", "prefix_tuning_flat", "loreft", "compacter[reduction_factor=2,phm_dim=2]", "dora"]


def made(name):
    torch.manual_seed(0)
    build, inputs, parts = MODELS[name]
    model = build().eval()
    adapters.init(model)
    return model, inputs, parts


def outputs(model, inputs):
    with torch.no_grad():
        return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


def changed(model, inputs):
    adapted = outputs(model, inputs)
    with adapters.AdapterSetup(None):
        plain = outputs(model, inputs)
    return any(not torch.equal(one, other) for one, other in zip(adapted, plain, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "part"), CASES)
def test_a_method_sits_in_the_part_that_is_named(name, part, method, tmp_path):
    model, inputs, parts = made(name)
    config = AdapterConfig.load(method, modules=part)
    model.add_adapter("a", config, set_active=True)
    disturb(model, "a")
    held = model.adapter_sites.holding("a")
    assert held and all(site.module_path.startswith(f"{parts[part]}.") for site, _ in held)
    assert changed(model, inputs)
    other = next(path for key, path in parts.items() if key != part)
    model.add_adapter("b", AdapterConfig.load(method, modules=f"{parts[part]}.*"))
    assert [site for site, _ in model.adapter_sites.holding("b")] == [site for site, _ in held]
    model.add_adapter("c", AdapterConfig.load(method, modules=list(parts)))
    model.add_adapter("d", method)
    everywhere = [site for site, _ in model.adapter_sites.holding("d")]
    assert [site for site, _ in model.adapter_sites.holding("c")] == [
        site for site in everywhere if site.module_path.startswith((f"{parts[part]}.", f"{other}."))
    ]
    model.save_adapter(tmp_path, "a")
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["config"]["modules"] == [part]
    fresh, _, _ = made(name)
    fresh.load_adapter(tmp_path, set_active=True)
    for one, other in zip(outputs(fresh, inputs), outputs(model, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES.values() if kind is not adapters.ConfigUnion])
def test_every_configuration_has_it_and_leaves_it_out_of_files(kind):
    required = {"adapters.methods.bottleneck": {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16,
                                                "non_linearity": "relu"}}.get(kind.__module__, {})  # fmt: skip
    try:
        config = kind(**required)
    except (ConfigError, TypeError):  # fields without defaults
        config = kind(layers="all", prefix_positions=1, suffix_positions=1, r=1, orthogonality=True)
    assert config.modules is None and "modules" not in config.to_dict()
    placed = config.replace(modules="text")
    assert placed.modules == ["text"] == placed.to_dict()["modules"] and placed != config
    assert kind.from_dict(placed.to_dict()) == placed


def test_positional_arguments_are_as_in_1x():
    assert LoRAConfig("lora", False, True).to_dict()["intermediate_lora"] is True
    assert SeqBnConfig(True).mh_adapter is True


@pytest.mark.parametrize("wrong", ["", [], [""], 3, {"text": 1}, [None]])
def test_what_is_no_part(wrong):
    with pytest.raises(ConfigError, match="no list of parts of a model"):
        LoRAConfig(modules=wrong)


def test_a_part_that_the_model_does_not_have():
    model, _, _ = made("clip")
    with pytest.raises(AdapterError, match=r"'visoin' is no part of CLIPModel; its parts are 'text', 'vision'"):
        model.add_adapter("a", LoRAConfig(modules=["text", "visoin"]))
    for method in ("lora", "seq_bn"):
        with pytest.raises(AdapterError, match=r"are outside of these, such as 'text_model\.encoder\.layers\.0"):
            model.add_adapter("a", AdapterConfig.load(method, modules="visual_projection"))
    with pytest.raises(AdapterError, match=r"all places of its .* are outside of these"):  # the embeddings are text's
        model.add_adapter("a", AdapterConfig.load("seq_bn_inv", modules="vision"))
    assert list(model.adapters_config) == []
    with pytest.raises(ConfigError, match="a fusion sits where its adapters do"):
        adapters.DynamicAdapterFusionConfig(modules="text")


def test_unions_have_parts_of_their_own():
    model, _, _ = made("clip")
    union = adapters.ConfigUnion(SeqBnConfig(modules="vision"), LoRAConfig(modules="text"))
    model.add_adapter("a", union)
    found = {(site.kind, site.module_path.partition("_")[0]) for site, _ in model.adapter_sites.holding("a")}
    assert found == {("sublayer", "vision"), ("linear", "text")}
