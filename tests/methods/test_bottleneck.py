"""Adapter+, parallel and scaled bottlenecks against their formulas, and how they start."""

import pytest
import torch
from tiny_models import adapted, disturb, inputs, output, plain, run

from adapters.signals import SublayerSignal


def with_adapter(config: str):
    model = adapted("bert")
    model.add_adapter("a", config)
    return model, model.get_adapter("a")[0]["output_adapter"]


def signal() -> SublayerSignal:
    return SublayerSignal(None, torch.randn(3, 5, 16), torch.randn(3, 5, 16))


def normalised(model, hidden):
    return model.encoder.layer[0].output.LayerNorm(hidden)


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["2.5", "'learned'", "'channel'"])
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn", "adapter_plus"])
def test_presets_are_their_formulas(preset, scaling):
    model, module = with_adapter(f"{preset}[reduction_factor=4,scaling={scaling}]")
    disturb(model, "a")
    scale = module.scaling
    if scaling != "2.5":
        assert isinstance(scale, torch.nn.Parameter) and scale.shape == ((1,) if scaling == "'learned'" else (16,))
    given = signal()
    x, r = given.hidden, given.residual

    def change(hidden):
        return module.adapter_up(module.adapter_down(hidden)) * scale

    h = normalised(model, x + r)
    wanted = {"seq_bn": change(h) + x, "double_seq_bn": change(x) + x, "par_bn": change(r) + x}
    found = module(given)
    torch.testing.assert_close(found.hidden, {**wanted, "adapter_plus": change(h) + h}[preset])
    assert (found.final is not None and bool(found.final.all())) == (preset == "adapter_plus")


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["4.0", "'learned'", "'channel'"])
def test_scaling_starts_as_configured(scaling):
    _, module = with_adapter(f"par_bn[scaling={scaling}]")
    assert torch.equal(torch.as_tensor(module.scaling), torch.full_like(torch.as_tensor(module.scaling), 4.0)) == (
        scaling == "4.0"
    )
    assert scaling == "4.0" or bool((module.scaling == 1).all())


@torch.no_grad()
def test_stochastic_depth_drops_rows_and_keeps_the_mean():
    model, module = with_adapter("adapter_plus[reduction_factor=4,stochastic_depth=0.25]")
    disturb(model, "a")
    given = SublayerSignal(None, torch.randn(1, 2, 16).expand(4000, -1, -1), torch.randn(1, 2, 16).expand(4000, -1, -1))
    certain = module(given).hidden[0]
    torch.manual_seed(0)
    module.train()
    found = module(given).hidden
    h = normalised(model, given.hidden + given.residual)[0]
    dropped = (found - h).abs().amax((1, 2)) < 1e-6
    assert 0.22 < dropped.float().mean() < 0.28
    torch.testing.assert_close(found[~dropped][0], h + (certain - h) / 0.75)
    assert all(torch.equal(rows, rows[:1].expand_as(rows)) for rows in (found[dropped], found[~dropped]))


def test_no_stochastic_depth_may_be_none_and_parallel_ones_have_none():
    for text in ("adapter_plus[stochastic_depth=None]", "par_bn[stochastic_depth=0.9]"):
        _, module = with_adapter(text)
        given = signal()
        torch.testing.assert_close(module.train()(given).hidden, module.eval()(given).hidden)


def test_houlsby_starts_small_and_without_biases():
    _, module = with_adapter("adapter_plus[reduction_factor=1]")
    for linear in (module.adapter_down[0], module.adapter_up):
        assert linear.weight.abs().max() <= 0.02 and 0.005 < linear.weight.std() < 0.015
        assert not linear.bias.any()


@pytest.mark.parametrize("init", ["bert", "mam_adapter"])
def test_other_starts(init):
    model, module = with_adapter(f"seq_bn[reduction_factor=1,use_gating=True,init_weights='{init}']")
    down, up, gate = module.adapter_down[0], module.adapter_up, module.gate
    assert not (down.bias.any() or up.bias.any() or gate.bias.any()) and gate.weight.abs().max() < 0.1
    if init == "bert":
        assert 0.01 < up.weight.std() < 0.03 and 0.01 < down.weight.std() < 0.03
    else:
        assert not up.weight.any() and 0.2 < down.weight.abs().max() <= 0.25
        torch.testing.assert_close(run(model, inputs("bert"), "a"), output(plain("bert"), inputs("bert")))
