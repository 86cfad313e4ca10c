"""Methods that form a change of the weight: one product with W + ΔW where they act alone."""

import pytest
import torch
from tiny_models import disturb, inputs, output, plain
from torch import nn
from torch.nn.functional import linear

import adapters
from adapters import Stack

CONFIGS = [
    "shira[r=2]",
    "hira[r=4]",
    "fourierft[n_frequency=50]",
    "miss[r=8,variant='bat']",
    "loha[r=16]",
    "randlora[r=4]",
]
each_config = pytest.mark.parametrize("config", CONFIGS)


def changed(config: str, prepare=lambda model: None):
    model = plain("bert").eval()
    prepare(model)
    adapters.init(model)
    torch.manual_seed(0)
    model.add_adapter("a", config=config, set_active=True)
    disturb(model, "a")
    model.add_adapter("start", config="lora")
    return model


def hosts(model) -> list[nn.Module]:
    return [site.host for site, _ in model.adapter_sites.holding("a")]


def gradients(model, setup) -> dict[str, torch.Tensor]:
    own = {name: parameter.requires_grad_() for name, parameter in model.named_parameters() if ".a." in name}
    (model(**inputs("bert"), adapter_names=setup)[0] ** 3).sum().backward()
    found = {name: parameter.grad for name, parameter in own.items() if parameter.grad is not None}
    model.zero_grad()
    return found


@each_config
def test_alone_is_as_in_a_stack(config: str) -> None:
    model = changed(config)
    alone, among = (output(model, inputs("bert"), adapter_names=setup) for setup in ("a", Stack("a", "start")))
    torch.testing.assert_close(alone, among, atol=2e-6, rtol=1e-5)
    expected = gradients(model, Stack("a", "start"))
    for name, gradient in gradients(model, "a").items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


@each_config
def test_the_forward_is_given_back(config: str) -> None:
    model = changed(config)
    replaced = hosts(model)
    assert all("forward" in vars(host) for host in replaced)
    model.delete_adapter("a")
    model.delete_adapter("start")
    assert not any("forward" in vars(module) for module in model.modules())


@each_config
def test_a_forward_of_somebody_else_stays(config: str) -> None:
    def prepare(model) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.forward = lambda x, module=module: linear(x, module.weight, module.bias)

    model = changed(config, prepare)
    theirs = [vars(host)["forward"] for host in hosts(model)]
    found = output(model, inputs("bert"))
    assert [vars(host)["forward"] for host in hosts(model)] == theirs
    torch.testing.assert_close(found, output(changed(config), inputs("bert")), atol=2e-6, rtol=1e-5)


def test_small_changes_survive_in_half_precision() -> None:
    """W + ΔW would round to W."""
    model = changed("hira[r=4]").to(torch.bfloat16)
    site, module = next(iter(model.adapter_sites.holding("a")))
    with torch.no_grad():
        module.hira_B.fill_(1e-4)
        module.hira_A.fill_(1.0)
        x = torch.randn(1, 4, site.inputs, dtype=torch.bfloat16)
        assert torch.equal(module.merged_weight(site.weight), site.weight)
        with adapters.AdapterSetup("a"):
            assert not site._stand_in.acts("a", x)
