"""ReFT reads a block's output as (b, s, d) however the model lays it out, or says why it cannot."""

import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel, Qwen2VLConfig, XLNetConfig, XLNetModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import adapters
from adapters import AdapterError, LoReftConfig, Parallel
from adapters.blocks import Form


@pytest.mark.parametrize(
    ("form", "shape"), [(Form(0, 1), (2, 6, 3, 4)), (Form(0, -1), (2, 3, 4, 6)), (Form(1, -1), (5, 2, 6))]
)
def test_a_form_there_and_back(form, shape):
    hidden = torch.randn(shape)
    sequence = form.sequence(hidden)
    assert sequence.shape[0] == 2 and sequence.shape[-1] == 6 and sequence.numel() == hidden.numel()
    torch.testing.assert_close(form.restored(sequence, hidden.shape), hidden, rtol=0, atol=0)


def changed(model, layer, **inputs):
    """What the adapter adds to the output of a block."""
    seen = []
    block = model.get_submodule(layer)
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        for name in (None, "a"):
            model.set_active_adapters(name)
            model(**inputs)
    handle.remove()
    return seen[1] - seen[0]


def test_positions_of_a_map_follow_line_by_line():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    model = ConvNextModel(config).eval()
    adapters.init(model)
    model.add_adapter("a", LoReftConfig(layers=[0], r=2, prefix_positions=3))
    change = changed(model, model.adapter_sites.anatomy.blocks[0].path, pixel_values=torch.randn(2, 3, 32, 32))
    touched = change.abs().amax((0, 1)).flatten().nonzero().flatten()
    assert touched.tolist() == [0, 1, 2]
    pixels = torch.randn(2, 3, 32, 32)
    model.add_adapter("b", LoReftConfig(r=2))
    single = []
    with torch.no_grad():
        for name in "ab":
            model.set_active_adapters(name)
            single.append(model(pixels).last_hidden_state)
        model.set_active_adapters(Parallel("a", "b"))
        torch.testing.assert_close(model(pixels).last_hidden_state, torch.cat(single))


def test_positions_in_front_of_the_batch():
    torch.manual_seed(0)
    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32)).eval()
    adapters.init(model)
    model.add_adapter("a", LoReftConfig(layers=[0], r=2, prefix_positions=3))
    change = changed(model, "layer.0", input_ids=torch.arange(12).view(2, 6))
    assert change.abs().sum(-1).nonzero().tolist() == [[place, row] for place in range(3) for row in range(2)]


VISION = Qwen2VLConfig(vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}).vision_config


def test_the_first_positions_of_each_image_of_those_in_one_dimension():
    torch.manual_seed(0)
    model = Qwen2VisionTransformerPretrainedModel(VISION).eval()
    adapters.init(model)
    model.add_adapter("a", LoReftConfig(r=2, prefix_positions=2, suffix_positions=1))
    pixels = torch.randn(24, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    change = changed(model, "blocks.0", hidden_states=pixels, grid_thw=grid)
    assert change.abs().sum(-1).nonzero()[:, 0].tolist() == [0, 1, 15, 16, 17, 23]
    model.blocks[0].forward = lambda hidden, **kwargs: hidden[:5]
    with pytest.raises(AdapterError, match=r"has 5 states for images of \[16, 8\] patches"):
        model(hidden_states=pixels, grid_thw=grid)
