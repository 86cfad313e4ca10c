"""Weights that are kept elsewhere until a module runs (`device_map`): adapters are where their hosts compute."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from tiny_models import METHODS, MORE_METHODS, changed, disturb, inputs, plain

import adapters
from adapters.errors import AdapterError

# All that accelerate offloads is on the meta device; what it loads for a pass is on the execution device.
METHODS_TRIED = ["double_seq_bn", "lora", "dora", "pissa", "vera", "oft", "hra", "ia3", "compacter_shared"]
METHODS_TRIED += ["seq_bn_inv", "unipelt", "prompt", "loreft"]
ON_DISK = {"embed_tokens": "cpu", "rotary_emb": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "disk"}
WAYS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: dispatch_model(model, ON_DISK, main_device="cpu", offload_dir=folder),
}


def with_adapter(model, method: str):
    adapters.init(model)
    torch.manual_seed(1)
    model.add_adapter("a", changed((METHODS | MORE_METHODS)[method], dropout=0.0))
    disturb(model, "a")
    model.set_active_adapters("a")
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS_TRIED)
def test_offloaded_weights_change_nothing(method: str, way: str, tmp_path: Path) -> None:
    model, batch = with_adapter(WAYS[way](plain("llama"), tmp_path), method), inputs("llama")
    assert any(parameter.is_meta for parameter in model.layers[1].parameters())
    assert not any(p.is_meta for module in model._modules_of("a") for p in module.parameters())
    whole = with_adapter(plain("llama"), method)
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], whole(**batch)[0])
    model.train_adapter("a")
    whole.train_adapter("a")
    for each in (model, whole):
        each(**batch)[0].pow(2).sum().backward()
    found, expected = ({n: p.grad for n, p in each.named_parameters() if p.requires_grad} for each in (model, whole))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_offloaded_weights_are_not_merged_into(tmp_path: Path) -> None:
    model = with_adapter(WAYS["cpu"](plain("llama"), tmp_path), "lora")
    with pytest.raises(AdapterError, match=r"offloaded or shared out .*; merge into a model that was loaded in one"):
        model.merge_adapter("a")
