"""What is saved and loaded computes what it did, bit for bit: every method, architecture, format and kind of model."""

import functools
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CONFIGS,
    GENERATORS,
    METHODS,
    MORE_METHODS,
    REFUSED,
    ROUNDED,
    disturb,
    inputs,
    output,
    plain,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import adapters

ALL = METHODS | MORE_METHODS
CASES = [(name, method) for name in CONFIGS for method in ALL if name not in REFUSED.get(method, ())]
WITH_HEAD = ("bert", "roberta", *GENERATORS)


@functools.cache
def models(name: str):
    """A bare model, one with a head if the architecture has any, and another bare one with an active adapter."""
    found = [plain(name), plain(name, head=name in WITH_HEAD), plain(name)]
    for model in found:
        adapters.init(model)
    found[2].add_adapter("other", "lora[r=2]", set_active=True)
    disturb(found[2], "other")
    return found


def file_of(folder, safe: bool):
    return folder / ("adapter.safetensors" if safe else "pytorch_adapter.bin")


@pytest.mark.parametrize(("name", "method"), CASES)
def test_from_a_bare_model_over_one_with_a_head_and_back(name: str, method: str, tmp_path) -> None:
    """In one format and in the other, under another name, while another adapter is active."""
    source, middle, target = models(name)
    safe = CASES.index((name, method)) % 2 == 0
    batch, before = inputs(name), output(target, inputs(name))
    try:
        source.add_adapter(method, ALL[method])
        disturb(source, method)
        source.save_adapter(tmp_path / "one", method, use_safetensors=safe)
        assert file_of(tmp_path / "one", safe).is_file() and not file_of(tmp_path / "one", not safe).exists()
        assert middle.load_adapter(tmp_path / "one", load_as="between", with_head=False) == "between"
        middle.save_adapter(tmp_path / "two", "between", with_head=False, use_safetensors=not safe)
        info: dict[str, list[str]] = {}
        assert target.load_adapter(tmp_path / "two", load_as="new", loading_info=info) == "new"
        assert info == {"missing_keys": [], "unexpected_keys": []}
        assert target.adapters_config.get("new") == source.adapters_config.get(method)
        assert torch.equal(output(target, batch), before)  # the other one is active
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if method in ROUNDED else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(run(target, batch, "new"), run(source, batch, method), **tolerance)
    finally:
        for model, adapter in ((source, method), (middle, "between"), (target, "new")):
            model.delete_adapter(adapter)


@pytest.mark.parametrize("method", ALL)
def test_overwriting_an_adapter_and_taking_the_dtype_of_the_model(method: str, tmp_path) -> None:
    name = "vit" if method == "bitfit" else "llama"
    source, target = plain(name), plain(name).to(torch.bfloat16)
    for model in (source, target):
        adapters.init(model)
        model.add_adapter("a", ALL[method])
        disturb(model, "a")
    source.save_adapter(tmp_path, "a")
    objects = {key: id(value) for key, value in target.named_parameters()}
    target.load_adapter(tmp_path)
    assert {key: id(value) for key, value in target.named_parameters()} == objects
    wanted = dict(source.named_parameters())
    for key, value in target.named_parameters():
        if any(value is parameter for module in target._modules_of("a") for parameter in module.parameters()):
            dtype = torch.bfloat16 if "dtype" not in ALL[method] or ALL[method].dtype is None else value.dtype
            assert value.dtype == dtype
            if method not in ROUNDED:
                assert torch.equal(value, wanted[key].to(dtype)), key


@pytest.mark.parametrize("method", ["lora", "ia3", "dora", "vera", "loha", "oft", "seq_bn", "prefix_tuning_flat"])
def test_loading_into_a_model_without_data(method: str, tmp_path) -> None:
    """Its modules are without data too; a state dict gives both later."""
    source, target = plain("bert"), plain("bert").to("meta")
    for model in (source, target):
        adapters.init(model)
    source.add_adapter("a", ALL[method])
    source.save_adapter(tmp_path, "a")
    target.load_adapter(tmp_path)
    assert {parameter.device.type for parameter in target.parameters()} == {"meta"}
    assert target.state_dict().keys() == source.state_dict().keys()


def test_loading_into_a_model_that_is_spread_by_a_device_map(tmp_path) -> None:
    source = plain("bert")
    source.save_pretrained(tmp_path / "base")
    spread = type(source).from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    for model in (source, spread):
        adapters.init(model)
    source.add_adapter("a", "lora")
    disturb(source, "a")
    source.save_adapter(tmp_path / "a", "a")
    spread.load_adapter(tmp_path / "a")
    assert torch.equal(run(spread.eval(), inputs("bert"), "a"), run(source, inputs("bert"), "a"))


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "pissa"])
def test_what_a_file_lacks_gets_start_values(method: str, tmp_path) -> None:
    source, target = plain("bert"), plain("bert")
    for model in (source, target):
        adapters.init(model)
    source.add_adapter("a", ALL[method])
    source.save_adapter(tmp_path, "a")
    weights = load_file(tmp_path / "adapter.safetensors")
    lost = next(key for key in weights if "layer.1" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    target.add_adapter("a", ALL[method])
    wanted = {key: value.clone() for key, value in target.state_dict().items()}[lost]
    target.delete_adapter("a")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="1 tensors are not in the file"):
        target.load_adapter(tmp_path)
    found = target.state_dict()
    assert torch.equal(found[lost], wanted)
    assert all(torch.equal(found[key], value) for key, value in weights.items() if key in found and key != lost)


class Made(TorchDispatchMode):
    """The bytes of all tensors that are made within."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        known = {value.untyped_storage().data_ptr() for value in arguments if isinstance(value, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.total += value.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("safe", [True, False])
def test_neither_saving_nor_loading_copies_the_model(safe: bool, tmp_path) -> None:
    config = BertConfig(vocab_size=5000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = BertModel(config)
    adapters.init(model)
    model.add_adapter("a", "lora[r=2]")
    base = sum(parameter.numel() * 4 for parameter in model.parameters())
    own = sum(parameter.numel() * 4 for module in model._modules_of("a") for parameter in module.parameters())
    assert base > 100 * own
    with Made() as made:
        model.save_adapter(tmp_path, "a", use_safetensors=safe)
    assert made.total <= 2 * own
    for name in ("b", "a"):
        with Made() as made, warnings.catch_warnings():
            model.load_adapter(tmp_path, load_as=name)
        assert made.total <= 5 * own, (name, made.total / own)
