"""A merged composition acts as the active one, for every method that can be merged: plain, fused and grouped maps."""

import copy
import functools

import pytest
import torch
from tiny_models import MERGES, METHODS, MORE_METHODS, REFUSED, adapted, disturb, inputs, output, plain, run

import adapters
from adapters import Average, CompositionError, Parallel, Stack

MODELS = ("bert", "gpt2", "llama")
MERGEABLE = [name for name in METHODS | MORE_METHODS if name in MERGES]
PAIRS = [(model, name) for model in MODELS for name in MERGEABLE if model not in REFUSED.get(name, ())]
SETUPS = {
    "after": lambda name, other: Stack(other, name),
    "before": lambda name, other: Stack(name, other),
    "average": lambda name, other: Average(name, None, Stack(other, name), weights=[0.5, 0.2, 0.3]),
}


@functools.cache
def everything(architecture: str, dtype: torch.dtype = torch.float32):
    """A model with every method that can be merged."""
    model = plain(architecture).to(dtype)
    adapters.init(model)
    for name in MERGEABLE:
        if architecture not in REFUSED.get(name, ()):
            model.add_adapter(name, (METHODS | MORE_METHODS)[name])
            disturb(model, name)
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("architecture", "method"), PAIRS)
def test_a_merged_composition_acts_as_the_active_one(architecture: str, method: str, setup: str) -> None:
    model, batch = everything(architecture), inputs(architecture)
    composition = SETUPS[setup](method, "lora" if method != "lora" else "loha")
    wanted, before = run(model, batch, composition), weights(model)
    model.merge_adapter(composition)
    assert model.adapter_sites.merged == composition
    merged = output(model, batch)
    model.reset_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_half_precision_is_rounded_once(architecture: str, dtype: torch.dtype) -> None:
    """The merged weights are those of the model in single precision, rounded: no product is rounded before.

    The norms of DoRA are those of its pass, in which W is rounded.
    """
    half = everything(architecture, dtype)
    wide = copy.deepcopy(half).float()
    for name in set(half.adapters_config) - {"dora", "dvora", "mtl_dora"}:
        before = weights(half)
        for model in (half, wide):
            model.merge_adapter(name)
        merged, wanted = half.state_dict(), wide.state_dict()
        assert any(not torch.equal(merged[key], before[key]) for key in merged), name
        for key in merged:
            if merged[key].is_floating_point():
                assert torch.equal(merged[key], wanted[key].to(dtype)), (name, key)
        for model in (half, wide):
            model.reset_adapter()
        assert all(torch.equal(value, before[key]) for key, value in half.state_dict().items())


def test_all_of_a_merged_composition_is_skipped_and_can_be_deleted() -> None:
    model, batch = adapted("bert", "lora", "ia3", "seq_bn"), inputs("bert")
    bare = weights(plain("bert"))
    wanted = run(model, batch, Stack("lora", "ia3", "seq_bn"))
    model.merge_adapter(Stack("lora", "ia3"))
    for setup in ("seq_bn", Stack("lora", "seq_bn"), Stack("ia3", "lora", "seq_bn")):
        torch.testing.assert_close(run(model, batch, setup), wanted, rtol=1e-4, atol=1e-5)
    model.delete_adapter("ia3")
    assert model.adapter_sites.merged is None
    assert all(torch.equal(model.state_dict()[key], value) for key, value in bare.items())
    model.merge_adapter("lora")
    model.reset_adapter()
    model.merge_adapter(Average("lora", None, weights=[2.0, -1.0]), delete_adapter=True)
    assert list(model.adapters_config) == ["seq_bn"]


def test_what_depends_on_rows_is_refused() -> None:
    model = adapted("bert", "lora", "ia3")
    before = weights(model)
    with pytest.raises(CompositionError, match="Parallel does not do the same to all tokens"):
        model.merge_adapter(Parallel("lora", "ia3"))
    with pytest.raises(adapters.AdapterError, match="names no adapter; give one of 'lora' and 'ia3'"):
        model.merge_adapter(None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
