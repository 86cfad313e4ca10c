"""Groups C and D of the defects of 1.x: bottlenecks, fusion, prefix tuning."""

import pytest
import torch
from tiny import CONFIGS, IDS, PADDING, close, differs, parameters, run, stir, tiny, with_adapters
from transformers import AutoModelForCausalLM

from adapters import AdapterFusionConfig, BnConfig, ConfigError, Fuse

PREFIX = "prefix_tuning[prefix_length=3,bottleneck_size=4]"
SEQ = "seq_bn[reduction_factor=4]"
ATTENTION_ONLY = "mh_adapter=True,output_adapter=False"
GATED = {
    "seq_bn": "seq_bn[use_gating=True]",
    "lora": "lora[r=2,use_gating=True]",
    "prefix_tuning": "prefix_tuning[prefix_length=3,bottleneck_size=4,use_gating=True]",
}


def seen(module, call):
    """What `module` is given during `call`."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    call()
    handle.remove()
    return inputs


def down(model, layer, sublayer="attention_adapters"):
    """The first map of the adapter "a"."""
    return layer.get_submodule(sublayer).adapters["a"].adapter_down


# --- C: bottlenecks and fusion


def test_c1_albert_keeps_the_layer_input_and_the_attention_output_apart():
    layer_of = lambda model: model.encoder.albert_layer_groups[0].albert_layers[0]  # noqa: E731
    outputs = []
    model = with_adapters("albert", {"a": f"double_seq_bn[{ATTENTION_ONLY}]"}, layers=1)
    layer_of(model).attention.dense.register_forward_hook(lambda module, args, output: outputs.append(output))
    close(seen(down(model, layer_of(model)), lambda: run(model, "a"))[0], outputs[-1])
    model = with_adapters("albert", {"a": f"par_bn[{ATTENTION_ONLY}]"}, layers=1)
    layer = layer_of(model)
    close(seen(down(model, layer), lambda: run(model, "a"))[0], seen(layer, lambda: run(model, "a"))[0])


@pytest.mark.parametrize("name", ["bert", "gemma2", "t5"])
def test_c2_each_layer_has_its_own_modules(name):
    model = with_adapters(name, {"a": "double_seq_bn[original_ln_before=True]"})
    sites = [site for site, _ in model.adapter_sites.holding("a")]
    for site in sites:
        own, sublayer = set(site.host.modules()), site.sublayer
        assert {sublayer.entry, sublayer.exit} | ({sublayer.norm} - {None}) <= own
    assert len(sites) == 4 * (2 if name == "t5" else 1)


@pytest.mark.parametrize("config", ["par_bn", "seq_bn"])
def test_c5_layers_whose_sublayers_run_in_parallel(config):
    model = with_adapters("phi", {"a": config})
    assert differs(run(model, "a"), run(model, None))
    model.add_adapter("b", "double_seq_bn")
    assert differs(run(model, "b"), run(model, None)) and differs(run(model, "b"), run(model, "a"))


@pytest.mark.parametrize(
    ("flags", "roles"),
    [
        ("mh_adapter=True", {"self_attention", "feed_forward"}),
        ("cross_adapter=True", {"cross_attention", "feed_forward"}),
    ],
)
@pytest.mark.parametrize("name", ["bert_decoder", "bart", "t5"])
def test_c4_c6_cross_attention_has_a_flag_of_its_own(name, flags, roles):
    model = with_adapters(name, {"a": f"seq_bn[{flags}]"})
    assert {site.role for site, _ in model.adapter_sites.holding("a") if site.stack != "encoder"} == roles


def test_c7_scaling_is_any_number():
    model = with_adapters("bert", {"a": BnConfig(False, True, 4, "relu", scaling=4)})
    assert differs(run(model, "a"), run(model, None))


def test_c8_post_add_says_what_it_needs_and_does_without_a_norm():
    with pytest.raises(ConfigError, match="it needs original_ln_before=True"):
        BnConfig(False, True, 4, "relu", residual_before_ln="post_add")
    model = with_adapters("gpt2", {"a": "seq_bn[residual_before_ln='post_add']"})
    assert differs(run(model, "a"), run(model, None))


@pytest.mark.parametrize("config", GATED.values(), ids=GATED)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_c9_gates_do_not_look_at_padding(name, config):
    model = with_adapters(name, {"a": config})
    batch = run(model, "a", mask=PADDING)
    for row, mask in enumerate(PADDING):
        length = int(mask.sum())
        close(batch[row, :length], run(model, "a", IDS[row : row + 1, :length], mask[None, :length])[0])


def test_c11_norms_stand_once_in_the_state_dict(tmp_path):
    model = with_adapters("bert", {"a": "seq_bn[ln_before=True,ln_after=True]"})
    tensors = [tensor.data_ptr() for name, tensor in model.state_dict().items() if ".a." in name]
    assert len(tensors) == len(set(tensors)) == 2 * 8
    model.save_adapter(tmp_path, "a", use_safetensors=True)
    fresh = tiny("bert")
    fresh.load_adapter(tmp_path)
    close(run(fresh, "a"), run(model, "a"))


def fused(layers=1, **changes):
    """A model with a fusion of two adapters."""
    model = with_adapters("bert", {"a": SEQ, "b": SEQ}, layers=layers)
    model.add_adapter_fusion(["a", "b"], AdapterFusionConfig.load("dynamic", **changes))
    stir(parameters(model, "a,b"), 0.5)
    model.set_active_adapters(Fuse("a", "b"))
    return model


def test_c15_the_temperature_falls_in_training_only_and_is_saved(tmp_path):
    model = fused(temperature=True)
    (layer,) = model.adapter_sites.fusion_layers()
    first = run(model, Fuse("a", "b"))
    assert torch.equal(run(model, Fuse("a", "b")), first)
    model.train()(IDS)
    assert 1 < layer.temperature < 50
    model.save_adapter_fusion(tmp_path, Fuse("a", "b"))
    fresh = with_adapters("bert", {"a": SEQ, "b": SEQ}, layers=1)
    fresh.load_adapter_fusion(tmp_path)
    assert next(fresh.adapter_sites.fusion_layers()).temperature == layer.temperature


def test_c16_a_fusion_dropout_of_0_is_0():
    assert [layer.dropout for layer in fused(dropout_prob=0.0).adapter_sites.fusion_layers()] == [0.0]
    assert [layer.dropout for layer in fused().adapter_sites.fusion_layers()] == [0.1]


def test_c17_the_residual_is_added_to_the_values_only():
    after, before = fused(), fused(residual_before=True)
    before.load_state_dict(after.state_dict())
    weights = [model(IDS, output_adapter_fusion_attentions=True).adapter_fusion_attentions for model in (after, before)]
    one, other = (record["a,b"][0]["output_adapter"] for record in weights)
    assert (one == other).all()


def test_c18_regularization_is_read():
    assert fused().get_fusion_regularization_loss() > 0
    assert fused(regularization=False).get_fusion_regularization_loss() is None


# --- D: prefix tuning


def both(name, setup=PREFIX, mask=None, **arguments):
    """The outputs of one model with eager and with fused attention."""
    models = [with_adapters(name, {"a": setup}, attn_implementation=kind, **arguments) for kind in ("eager", "sdpa")]
    return [run(model, "a", mask=mask) for model in models], run(models[0], None, mask=mask)


@pytest.mark.parametrize("mask", [None, PADDING], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bart", "distilbert", "bert", "t5"])
def test_d1_d2_d3_d4_attention_implementations_agree(name, mask):
    (eager, fused_attention), without = both(name, mask=mask)
    real = slice(None) if mask is None else mask.bool()
    close(fused_attention[real], eager[real])
    assert differs(eager[real], without[real])


def test_d1_every_token_sees_the_prefix_and_itself():
    """Attention weights over the real keys are those without prefix, up to the share that the prefix takes."""
    model = with_adapters("gpt2", {"a": PREFIX}, layers=1, attn_implementation="eager")
    weights = {}
    for setup in ("a", None):
        model.set_active_adapters(setup)
        weights[setup] = model(IDS, output_attentions=True).attentions[0]
    prefix, real = weights["a"].split([3, IDS.shape[1]], -1)
    assert (prefix > 0).all()
    close(real / real.sum(-1, keepdim=True), weights[None])


@pytest.mark.parametrize("config", [PREFIX, "lora[r=2]", SEQ, "par_bn"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_d5_generation_with_cache_is_that_without(name, config):
    model = with_adapters(name, {"a": config}, model_class=AutoModelForCausalLM)
    model.set_active_adapters("a")
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = PADDING.flip(1)
    cached = model.generate(IDS, attention_mask=mask, use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **kwargs))


@pytest.mark.parametrize("config", [PREFIX, f"{PREFIX}|{SEQ}"], ids=["alone", "in a union"])
def test_d7_prefixes_are_saved_once(config, tmp_path):
    model = with_adapters("bert", {"a": config})
    tensors = [tensor.data_ptr() for name, tensor in model.state_dict().items() if "a" in name.split(".")]
    assert len(tensors) == len(set(tensors))
    model.save_adapter(tmp_path, "a", use_safetensors=True)
    fresh = tiny("bert")
    fresh.load_adapter(tmp_path)
    close(run(fresh, "a"), run(model, "a"))


@pytest.mark.parametrize("config", [PREFIX, "prefix_tuning[prefix_length=3,leave_out=[0,2]]"])
def test_d8_the_position_bias_of_real_tokens_stays(config):
    """In the first layer that has a prefix the weights among real keys are those without."""
    model = with_adapters("t5", {"a": config}, attn_implementation="eager")
    layer, weights = (1 if "leave_out" in config else 0), {}
    for setup in ("a", None):
        model.set_active_adapters(setup)
        weights[setup] = model(input_ids=IDS, decoder_input_ids=IDS, output_attentions=True).encoder_attentions[layer]
    real = weights["a"][..., 3:]
    close(real / real.sum(-1, keepdim=True), weights[None])


def test_d9_the_width_of_heads_is_the_models():
    model = with_adapters("mistral", {"a": PREFIX})
    assert CONFIGS["mistral"](1).head_dim * 4 != 16
    assert differs(run(model, "a"), run(model, None))
