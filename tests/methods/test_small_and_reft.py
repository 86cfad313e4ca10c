"""ReFT, LN tuning, BitFit, HiRA and SHiRA: formulas, PEFT's outputs, options."""

import copy

import peft
import pytest
import safetensors.torch
import torch
from tiny_models import DECODERS, adapted, disturb, inputs, output, plain, run

import adapters
from adapters import AdapterConfig, AdapterError

pytestmark = pytest.mark.filterwarnings(  # all of them PEFT's
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)

REFTS = {
    "loreft": "loreft[r=2,suffix_positions=2]",
    "noreft_tied": "noreft[r=2,suffix_positions=1,tied_weights=True,non_linearity='tanh']",
    "direft": "direft[r=3,prefix_positions=2]",
    "short": "loreft[r=1,prefix_positions=5,suffix_positions=5]",
}


def with_adapter(name: str, config, adapter: str = "a"):
    model = adapted(name)
    model.add_adapter(adapter, config)
    disturb(model, adapter)
    return model


def naive(module, config, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The formula, row by row and token by token."""
    result = hidden.clone()
    for row in range(len(hidden)):
        real = mask[row].nonzero().flatten().tolist()
        chosen = [(place, 0) for place in real[: config.prefix_positions]]
        chosen += [(place, -1) for place in real[max(0, len(real) - config.suffix_positions) :]]
        for place, number in chosen:
            unit, h = module.units[number], hidden[row, place]
            source = unit.learned_source(h)
            source = torch.tanh(source) if config.non_linearity else source
            projection = unit.projection.weight
            source = source - projection @ h if config.subtract_projection else source
            result[row, place] = h + source @ projection
    return result


@pytest.mark.parametrize("text", REFTS.values(), ids=REFTS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_reft_changes_the_first_and_last_real_tokens(text: str, side: str) -> None:
    config = AdapterConfig.load(text).replace(layers=[1])
    batch = inputs("bert", side=side)
    model = with_adapter("bert", config)
    wanted = naive(model.get_adapter("a")[1]["output_reft"], config, output(model, batch), batch["attention_mask"])
    torch.testing.assert_close(run(model, batch, "a"), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
@pytest.mark.parametrize("text", REFTS.values(), ids=REFTS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_reft_generates_with_a_cache_as_without(name: str, text: str, cache: str) -> None:
    model = plain(name, head=True)
    adapters.init(model)
    model.add_adapter("a", text, set_active=True)
    disturb(model, "a")
    batch = inputs(name, rows=3, side="left" if name in DECODERS else "right")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        kept = model.generate(**batch, **length, return_dict_in_generate=True, cache_implementation=cache)
        anew = model.generate(**batch, **length, return_dict_in_generate=True, use_cache=False)
    torch.testing.assert_close(torch.stack(kept.logits), torch.stack(anew.logits), rtol=1e-3, atol=1e-4)


def test_a_rotation_is_orthonormal_whatever_the_size_of_its_parameter() -> None:
    module = with_adapter("bert", "loreft[r=3]").get_adapter("a")[0]["output_reft"]
    rotation = module.units[0].projection
    before = rotation.weight.detach().clone()
    with torch.no_grad():
        rotation.original.mul_(0.9)
    torch.testing.assert_close(rotation.weight, before)
    torch.testing.assert_close(rotation.weight @ rotation.weight.T, torch.eye(3), atol=1e-6, rtol=0)


def test_reft_refuses_more_directions_than_there_are() -> None:
    with pytest.raises(AdapterError, match=r"r=17.*16 at most"):
        adapted("bert").add_adapter("a", "loreft[r=17]")


def peft_pair(name: str, config, theirs) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model with our adapter and with PEFT's."""
    ours = adapted(name)
    ours.add_adapter("a", config)
    disturb(ours, "a")
    return ours, peft.get_peft_model(plain(name), theirs).eval()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@torch.no_grad()
def test_ln_tuning_is_that_of_peft(name: str) -> None:
    targets = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
    targets["gpt2"] = ["ln_1", "ln_2", "ln_f"]
    ours, theirs = peft_pair(name, "ln_tuning", peft.LNTuningConfig(target_modules=targets[name]))
    for site, module in ours.adapter_sites.holding("a"):
        tuned = theirs.base_model.model.get_submodule(site.host_path).ln_tuning_layers["default"]
        tuned.weight += module.weight
        if module.bias is not None:
            tuned.bias += module.bias
    batch = inputs(name)
    torch.testing.assert_close(run(ours, batch, "a"), output(theirs, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@torch.no_grad()
def test_bitfit_changes_every_bias(name: str) -> None:
    model, tuned = with_adapter(name, "bitfit"), plain(name)
    changed = set()
    for site, module in model.adapter_sites.holding("a"):
        bias = tuned.get_submodule(site.host_path).bias
        start = site.start if site.kind == "linear" else 0
        bias[start : start + len(module.bias)] += module.bias
        changed.add(f"{site.host_path}.bias")
    biases = {key for key, _ in plain(name).named_parameters() if key.endswith(".bias") and "pooler" not in key}
    assert changed == biases
    batch = inputs(name)
    torch.testing.assert_close(run(model, batch, "a"), output(tuned, batch), atol=1e-5, rtol=1e-5)


def test_a_bias_that_is_not_there_cannot_be_merged() -> None:
    model = with_adapter("llama", "bitfit[missing_too=True]")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match="has no bias"):
        model.merge_adapter("a")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_hira_is_that_of_peft() -> None:
    ours, theirs = peft_pair("bert", "hira[r=2]", peft.HiraConfig(r=2, target_modules=["query", "value"]))
    for site, module in ours.adapter_sites.holding("a"):
        layer = theirs.base_model.model.get_submodule(site.host_path)
        layer.hira_A["default"].copy_(module.hira_A)
        layer.hira_B["default"].copy_(module.hira_B)
    batch = inputs("bert")
    torch.testing.assert_close(run(ours, batch, "a"), output(theirs, batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shira_is_that_of_peft() -> None:
    ours, theirs = peft_pair("bert", "shira[r=2]", peft.ShiraConfig(r=2, target_modules=["query", "value"]))
    for site, module in ours.adapter_sites.holding("a"):
        layer = theirs.base_model.model.get_submodule(site.host_path)
        layer.shira_indices["default"] = module.shira_indices.clone()
        layer.shira_weight["default"].copy_(module.shira_weight)
    batch = inputs("bert")
    torch.testing.assert_close(run(ours, batch, "a"), output(theirs, batch), atol=1e-5, rtol=1e-5)


def test_shira_refuses_more_entries_than_there_are() -> None:
    with pytest.raises(AdapterError, match="at most here"):
        adapted("bert").add_adapter("a", "shira[r=9]")


@torch.no_grad()
def test_a6_a_reft_acts_wherever_it_stands_in_a_stack() -> None:
    model, batch = with_adapter("bert", "noreft", "reft"), inputs("bert")
    model.add_adapter("bn", "seq_bn[reduction_factor=4]")
    disturb(model, "bn")
    alone, both = run(model, batch, "bn"), run(model, batch, adapters.Stack("bn", "reft"))
    assert (alone - both).abs().amax(-1)[:, :3].min() > 1e-3


@torch.no_grad()
def test_e4_the_average_of_rotations_is_a_rotation() -> None:
    model = with_adapter("bert", "loreft[r=2]", "a")
    model.add_adapter("b", "loreft[r=2]")
    model.average_adapter("c", ["a", "b"], weights=[0.5, 0.5])
    rotation = model.get_adapter("c")[0]["output_reft"].units[0].projection.weight
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_e7_the_decoder_has_positions_of_its_own(name: str) -> None:
    """With another length and padding than the encoder's."""
    config = AdapterConfig.load("noreft[prefix_positions=2,suffix_positions=1]")
    model = with_adapter(name, config.replace(layers=[3]))
    batch = inputs(name, side="left")
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :3]
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]])
    layer = model.get_submodule(model.adapter_sites.holding("a")[0][0].host_path)
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)
    found = []
    after = layer.register_forward_hook(lambda module, args, output: found.append(output))
    run(model, batch, "a")
    handle.remove()
    after.remove()
    before, adapted_states = (
        value[0] if isinstance(value[0], torch.Tensor) else value[0][0] for value in (seen, found)
    )
    module = model.get_adapter("a")[3]["output_reft"]
    wanted = naive(module, config, before, batch["decoder_attention_mask"])
    torch.testing.assert_close(adapted_states, wanted, atol=1e-5, rtol=1e-5)


def test_e8_layers_are_checked_and_left_out(tmp_path) -> None:
    model = with_adapter("bert", "noreft")
    with pytest.raises(AdapterError, match="no layer 7"):
        model.add_adapter("b", "noreft[layers=[0,7]]")
    model.save_adapter(tmp_path, "a")
    model.load_adapter(tmp_path, load_as="c", leave_out=[0])
    assert list(model.get_adapter("c")) == [1]


def test_e9_reft_of_another_dtype() -> None:
    model = with_adapter("bert", "noreft[dtype='bfloat16']")
    assert {parameter.dtype for _, module in model.adapter_sites.holding("a") for parameter in module.parameters()} == {
        torch.bfloat16
    }
    assert run(model, inputs("bert"), "a").dtype == torch.float32


def test_e3_a_collapsed_rotation_of_1x_is_read_without_effect(tmp_path) -> None:
    model, batch = with_adapter("bert", "loreft"), inputs("bert")
    model.save_adapter(tmp_path, "a")
    file = tmp_path / "adapter.safetensors"
    weights = safetensors.torch.load_file(file)
    decayed = {key: value * 0.999 if key.endswith("weight.original") else value for key, value in weights.items()}
    safetensors.torch.save_file(decayed, file)
    with pytest.warns(UserWarning, match="has collapsed to zero"):
        model.load_adapter(tmp_path, load_as="b")
    torch.testing.assert_close(run(model, batch, "b"), run(model, batch, None), atol=1e-6, rtol=0)
