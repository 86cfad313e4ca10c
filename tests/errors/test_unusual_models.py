"""Models and calls off the beaten track: they work, or are refused with a message; nothing has silently no effect."""

import warnings

import pytest
import torch
from tiny_models import disturb
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    IBertConfig,
    IBertModel,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import adapters
from adapters import AdapterError, CompositionError, ConfigError, LoRAConfig, Parallel

TEXT = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IDS = torch.arange(3, 27).view(4, 6)


def bert(**settings):
    return BertForSequenceClassification(BertConfig(**SIZE, **TEXT, **settings)).eval()


def initialised(model):
    adapters.init(model.eval())
    return model


def test_init_of_the_whole_takes_over_what_its_base_has():
    model = bert()
    adapters.init(model.bert)
    model.bert.add_adapter("a", set_active=True)
    disturb(model.bert, "a")
    before = model(IDS).logits
    adapters.init(model)
    assert list(model.adapters_config) == ["a"]
    assert torch.equal(model(IDS).logits, before)
    model.set_active_adapters(None)
    assert not torch.equal(model(IDS).logits, before)


def test_gpt2_cross_attention_has_its_query_beside_keys_and_values():
    model = initialised(GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=4, add_cross_attention=True, **TEXT)))
    model.add_adapter("a", LoRAConfig(attn_matrices=["q", "k", "v", "o"]))
    places = {site.path: (site.start, site.outputs) for site, _ in model.adapter_sites.holding("a")}
    assert places["h.0.crossattention.q_attn"] == (0, 16)
    assert places["h.0.crossattention.c_attn.k"] == (0, 16)
    assert places["h.0.crossattention.c_attn.v"] == (16, 16)
    assert places["h.0.crossattention.c_proj"] == (0, 16)


def test_maps_that_are_no_plain_ones():
    """I-BERT's maps take and return scaling factors beside their tensors."""
    model = initialised(IBertModel(IBertConfig(**SIZE, **TEXT)))
    with pytest.raises(AdapterError, match="IBertModel has no site for 'selfattn_lora'"):
        model.add_adapter("a", "lora")


def test_the_names_that_transformers_has_for_activating(caplog):
    model = initialised(bert())
    for name in "ab":
        model.add_adapter(name)
    model.set_adapter("a")
    assert model.active_adapters == adapters.Stack("a")
    model.disable_adapters()
    assert model.active_adapters is None
    model.set_active_adapters(adapters.Stack("a", "b"))
    model.delete_adapter("a")
    assert "stays active without it" in caplog.text
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("config", ["double_seq_bn", "seq_bn"])
def test_chunked_feed_forward(config):
    model, whole = initialised(bert(chunk_size_feed_forward=2)), initialised(bert())
    for each in (model, whole):
        each.add_adapter("a", config, set_active=True)
    assert len(model.adapter_sites.holding("a")) == len(whole.adapter_sites.holding("a"))
    disturb(whole, "a")
    model.load_state_dict(whole.state_dict())
    torch.testing.assert_close(model(IDS).logits, whole(IDS).logits)


def test_adapters_in_another_dtype_than_the_model():
    model = initialised(LlamaModel(LlamaConfig(num_key_value_heads=2, **SIZE, **TEXT)).to(torch.bfloat16))
    for config in ("double_seq_bn", "par_bn", "adapter_plus", "lora", "prefix_tuning"):
        model.add_adapter(config, config)
        model.adapter_to(config, dtype=torch.float32)
        model.set_active_adapters(config)
        assert model(IDS)[0].dtype == torch.bfloat16


def test_generation_whose_first_argument_is_no_text():
    torch.manual_seed(0)
    sizes = {f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in SPEECH.items()}
    config = WhisperConfig(d_model=16, num_mel_bins=8, max_source_positions=8, max_target_positions=16, **sizes, **TEXT)
    config.decoder_start_token_id = 1
    model = WhisperForConditionalGeneration(config).eval()
    speech = torch.randn(1, 8, 16)
    arguments = {"suppress_tokens": None, "begin_suppress_tokens": None, "max_new_tokens": 3}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.generate(input_features=speech, **arguments).scores[0]
        assert torch.equal(initialised(model).generate(input_features=speech, **arguments).scores[0], plain)
    model.add_adapter("a", "seq_bn", set_active=True)
    disturb(model, "a")
    assert not torch.equal(model.generate(input_features=speech, **arguments).scores[0], plain)


SPEECH = {"layers": 1, "attention_heads": 4, "ffn_dim": 24}


def test_what_a_model_lacks_is_named():
    model = initialised(MixtralModel(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZE, **TEXT)))
    with pytest.raises(AdapterError, match="has no site for 'intermediate_lora' and 'output_lora'"):
        model.add_adapter("a", LoRAConfig(intermediate_lora=True, output_lora=True, use_dora=True))


def test_prefixes_of_towers_of_different_shapes():
    tower = {**SIZE, "hidden_size": 32, "image_size": 8, "patch_size": 4}
    model = initialised(CLIPModel(CLIPConfig(text_config={**SIZE, "vocab_size": 48}, vision_config=tower)))
    model.add_adapter("a", "prefix_tuning")
    groups = model.adapter_sites.shared("a")["prefix_tuning.prefix_tunings.a"]
    assert {name: group.shape.key_width for name, group in groups.items()} == {"self_prefix": 4, "self_prefix_1": 8}


def test_replaced_modules_are_noticed():
    model = initialised(bert())
    model.bert.encoder.layer[0].attention.self.query = torch.nn.Linear(16, 16)
    with pytest.raises(AdapterError, match=r"encoder\.layer\.0\.attention\.self\.query is not the one"):
        model.add_adapter("a", "lora")
    assert list(model.adapters_config) == []


def test_parts_called_by_themselves_under_parallel():
    model = initialised(T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)))
    model.add_adapter("a", "lora")
    model.set_active_adapters(Parallel("a", None))
    with pytest.raises(CompositionError, match="call the model as a whole"):
        model.get_encoder()(IDS)


def test_a_checkpoint_with_adapters_is_read_by_load_model(tmp_path):
    model = initialised(bert())
    model.add_adapter("a")
    model.save_pretrained(tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="load_model"):
        adapters.init(plain)
    loaded, info = adapters.load_model(tmp_path, BertForSequenceClassification, output_loading_info=True)
    assert not info["missing_keys"] and list(loaded.adapters_config) == ["a"]


@pytest.mark.parametrize("config", ["", {}])
def test_an_empty_configuration_is_no_default(config):
    with pytest.raises(ConfigError, match="is empty"):
        initialised(bert()).add_adapter("a", config=config)


@pytest.mark.parametrize("setup", [None, "", []])
def test_training_nothing(setup):
    model = initialised(bert())
    with pytest.raises(AdapterError, match="it names no adapter"):
        model.train_adapter(setup)
    assert all(parameter.requires_grad for parameter in model.parameters())
