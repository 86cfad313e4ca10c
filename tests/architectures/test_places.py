"""Places that only some architectures have: maps whose weight is read, convolutions, stacks without embeddings."""

import copy
from typing import Any

import pytest
import torch
from cells import close, disturb, outputs, own_parameters, same, with_adapters
from inputs import inputs_for
from models import tiny_model
from torch import nn

import adapters
from adapters import AdapterConfig, AdapterError, CompositionError, LoRAConfig, Parallel, PromptTuningConfig, Stack

pytestmark = pytest.mark.filterwarnings("ignore")
READ = LoRAConfig(r=2, alpha=4, attn_matrices=["q", "k", "v", "o"], init_weights="bert")
CONVOLVED = LoRAConfig(r=2, alpha=4, target_modules=r".*conv(olution|\d)", init_weights="bert")


def ready(model_type: str, *configs: AdapterConfig | str) -> tuple[Any, Any, dict[str, Any]]:
    """A bare model, one with adapters "a", "b", … of these configurations, and inputs."""
    plain = tiny_model(model_type)
    model = with_adapters(plain)
    for seed, (name, config) in enumerate(zip("abc", configs, strict=False)):
        model.add_adapter(name, config)
        disturb(model, name, seed)
    return plain, model, inputs_for(plain)


@pytest.mark.parametrize(("model_type", "config"), [("wavlm", READ), ("resnet", CONVOLVED), ("poolformer", CONVOLVED)])
def test_the_change_is_that_of_the_merged_weight(model_type: str, config: LoRAConfig) -> None:
    _, model, batch = ready(model_type, config, config)
    for setup in ("a", Stack("a", "b")):
        model.set_active_adapters(setup)
        wanted = outputs(model, batch)
        model.set_active_adapters(None)
        assert not same(outputs(model, batch), wanted)
        model.merge_adapter(setup)
        close(outputs(model, batch), wanted, "merged, it is another change")
        model.reset_adapter()


def test_what_was_lent_is_taken_back() -> None:
    plain, model, batch = ready("wavlm", READ)
    wanted = outputs(plain, batch)
    host = model.encoder.layers[0].attention.q_proj
    model.set_active_adapters("a")
    outputs(model, batch)
    assert isinstance(host.weight, nn.Parameter) and "weight" not in vars(host)
    with pytest.raises(RuntimeError):
        model(batch["input_values"].to(torch.complex64))
    assert "weight" not in vars(host)
    assert torch.equal(copy.deepcopy(model)(**batch)[0], model(**batch)[0])
    model.delete_adapter("a")
    assert same(outputs(model, batch), wanted) and not model.encoder.layers[0].attention._forward_pre_hooks


def test_a_map_that_is_read_does_the_same_to_all_rows() -> None:
    _, model, batch = ready("wavlm", READ, READ)
    model.set_active_adapters(Parallel("a", "b"))
    with pytest.raises(CompositionError, match="only adapters in Stack and Average can be worked into them"):
        model(**batch)


def test_all_linear_leaves_convolutions_out() -> None:
    model = with_adapters(tiny_model("vit"))
    model.add_adapter("a", LoRAConfig(target_modules="all-linear"))
    assert all(isinstance(site.host, nn.Linear) for site, _ in model.adapter_sites.holding("a"))


@pytest.mark.parametrize("model_type", ["clip", "owlvit_vision_model", "unispeech"])
def test_prompts_are_seen_within_the_blocks_alone(model_type: str) -> None:
    plain, model, batch = ready(model_type, PromptTuningConfig(prompt_length=3))
    wanted = outputs(plain, batch)
    model.set_active_adapters("a")
    found = outputs(model, batch)
    assert [one.shape for one in found] == [one.shape for one in wanted] and not same(found, wanted)
    stacks = {site.host_path for site, _ in model.adapter_sites.holding("a")}
    assert len(stacks) == len(own_parameters(model, "a")) == (2 if model_type == "clip" else 1)
    model.delete_adapter("a")
    assert same(outputs(model, batch), wanted)


def test_prompts_of_a_tower_that_is_called_by_itself() -> None:
    _, model, batch = ready("clip", PromptTuningConfig(prompt_length=3))
    model.set_active_adapters("a")
    whole = model(**batch).text_embeds
    alone = model.text_projection(model.text_model(input_ids=batch["input_ids"]).pooler_output)
    torch.testing.assert_close(whole, alone / alone.norm(dim=-1, keepdim=True))


def test_prompts_within_blocks_refuse_what_they_cannot_do() -> None:
    _, model, batch = ready("unispeech", PromptTuningConfig(prompt_length=3), PromptTuningConfig(prompt_length=2))
    model.set_active_adapters(Parallel("a", "b"))
    with pytest.raises(CompositionError, match="must be of one length"):
        model(**batch)
    with pytest.raises(AdapterError, match="no first token"):
        model.add_adapter("c", PromptTuningConfig(combine="prefix_after_bos"))
    with pytest.raises(AdapterError, match="reads no tokens"):
        model.add_adapter("c", PromptTuningConfig(prompt_init="from_string", prompt_init_text=[1, 2]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_prompts_within_blocks_have_their_gradient_under_checkpointing(reentrant: bool) -> None:
    _, model, batch = ready("owlvit_vision_model", PromptTuningConfig(prompt_length=3))
    model.train_adapter("a")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch)[0].sum().backward()
        gradients += [parameter.grad for parameter in own_parameters(model, "a")]
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("model_type", ["beit", "xlm", "doge"])
def test_both_sublayers_are_found(model_type: str) -> None:
    """With scales of layers or of the stream, and with blocks that add outside of themselves."""
    model = with_adapters(tiny_model(model_type))
    model.add_adapter("a", "double_seq_bn")
    layers = {site.layer for site, _ in model.adapter_sites.holding("a")}
    assert len(layers) > 1
    for layer in layers:
        roles = {site.location for site, _ in model.adapter_sites.holding("a") if site.layer == layer}
        assert {"mh_adapter", "output_adapter"} <= roles


def test_layers_that_are_counted_by_stack_are_known_by_number() -> None:
    model = with_adapters(tiny_model("lxmert"))
    with pytest.raises(AdapterError, match="has no layer 99"):
        model.add_adapter("a", LoRAConfig(leave_out=[99]))
    assert adapters.init(model) is model
