"""Route: a gate over adapters, learned or of Arrow, for every token or for whole sequences."""

import pytest
import torch
from tiny_models import CONFIGS, METHODS, adapted, disturb, inputs, positions, rows_of, run

from adapters import Average, BatchSplit, CompositionError, LoRAConfig, Route, RouterConfig, Stack

METHODS_OF_EXPERTS = ("lora", "seq_bn", "par_bn", "prefix_tuning", "mam")


def experts(name: str, method: str, **settings):
    """A model with two adapters, a and b, and a gate over them."""
    model = adapted(name)
    for adapter in "ab":
        model.add_adapter(adapter, METHODS[method])
        disturb(model, adapter)
    model.add_adapter("gate", RouterConfig(experts=["a", "b"], **settings))
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", METHODS_OF_EXPERTS)
def test_a_new_gate_averages(name: str, method: str) -> None:
    model, batch = experts(name, method), inputs(name)
    mean = run(model, batch, Average("a", "b"))
    torch.testing.assert_close(run(model, batch, Route("a", "b", gate="gate")), mean, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(run(model, batch, "gate"), run(model, batch, None), rtol=0, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("method", METHODS_OF_EXPERTS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_rows_are_routed_as_by_themselves(name: str, method: str, level: str) -> None:
    model, batch = experts(name, method, level=level, top_k=1), inputs(name)
    disturb(model, "gate", scale=3.0)
    route = Route("a", "b", gate="gate")
    alone = torch.cat([run(model, rows_of(batch, [row]), route) for row in range(4)])
    torch.testing.assert_close(run(model, batch, route), alone, rtol=1e-4, atol=2e-5)
    setup = BatchSplit(route, "a", Stack("b", "a"), None, batch_sizes=1)
    parts = [run(model, rows_of(batch, [row]), child) for row, child in enumerate(setup.children)]
    torch.testing.assert_close(run(model, batch, setup), torch.cat(parts), rtol=1e-4, atol=2e-5)


def test_the_best_expert_of_each_token_acts() -> None:
    model, batch = experts("bert", "lora", top_k=1), inputs("bert")
    for site, gate in model.adapter_sites.holding("gate"):
        with torch.no_grad():
            gate.weight[0].fill_(0.0)
            gate.weight[1].copy_(torch.full_like(gate.weight[1], 1e-3))
        x = torch.randn(2, 3, site.inputs)
        first, second = gate.mix(site_signal(x, site), ["a", "b"])
        assert torch.equal(first + second, torch.ones(2, 3, 1))
        assert torch.equal(second[..., 0] > 0.5, x.sum(-1) > 0)
    assert torch.isfinite(run(model, batch, Route("a", "b", gate="gate"))).all()


def site_signal(x, site):
    from adapters.signals import LinearSignal

    return LinearSignal(None, x, site.host(x))


def test_training_reaches_gate_and_experts() -> None:
    model, batch = experts("bert", "lora"), inputs("bert")
    model.train_adapter(Route("a", "b", gate="gate"))
    model(**batch)[0].square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".routers.gate.weight" in name for name in trained)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name


def test_arrow_prefers_the_expert_whose_direction_it_is() -> None:
    model = adapted("bert")
    for adapter in "ab":
        model.add_adapter(adapter, LoRAConfig(r=1))
        disturb(model, adapter)
    model.add_adapter("arrow", RouterConfig(experts=["a", "b"], kind="arrow", top_k=1))
    model.eval()
    assert not next(iter(model._modules_of("arrow"))).state_dict()
    for site, gate in model.adapter_sites.holding("arrow"):
        directions = torch.stack([site.adapters[adapter].lora_A[0].detach() for adapter in "ab"])[None]
        first, second = gate.mix(site_signal(directions, site), ["a", "b"])
        assert first[0, :, 0].tolist() == [1.0, 0.0]
        assert second[0, :, 0].tolist() == [0.0, 1.0]
    assert torch.isfinite(run(model, inputs("bert"), Route("a", "b", gate="arrow"))).all()


def test_a_gate_is_saved_and_loaded(tmp_path) -> None:
    model, batch, route = experts("bert", "seq_bn"), inputs("bert"), Route("a", "b", gate="gate")
    disturb(model, "gate")
    expected = run(model, batch, route)
    for adapter in ("a", "b", "gate"):
        model.save_adapter(str(tmp_path / adapter), adapter)
    other = adapted("bert")
    for adapter in ("a", "b", "gate"):
        other.load_adapter(str(tmp_path / adapter))
    assert torch.equal(run(other.eval(), batch, route), expected)
    assert positions("bert") == expected.shape[1]


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (lambda: Route("a", "c", gate="gate"), "was made for the experts 'a' and 'b', 'c' is none"),
        (lambda: Route("a", "b", gate="c"), "it is a LoRA, no gate"),
        (lambda: Route("a", None, gate="gate"), "name each of them"),
        (lambda: Route("a", "b", gate="other"), "'other'"),
    ],
)
def test_bad_routes(setup, message: str) -> None:
    model = experts("bert", "lora")
    model.add_adapter("c", METHODS["lora"])
    with pytest.raises((CompositionError, ValueError), match=message):
        model.set_active_adapters(setup())
    assert model.active_adapters is None
