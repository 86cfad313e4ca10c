"""``average_adapter`` next to PEFT's ``add_weighted_adapter``: every strategy of LoRAs, on the same adapters."""

import pytest
import torch
from tiny_models import disturb, generator, plain

import adapters
from adapters import LoRAConfig

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name

STRATEGIES = {  # PEFT's name: ours
    "linear": "lora_linear",
    "cat": "lora_cat",
    "svd": "lora_delta_w_svd",
    **{name: name for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
    **{f"{name}_svd": f"lora_delta_w_{name}_svd" for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
}
WEIGHTS = ([0.7, 0.4, 1.1], [1.0, -0.6, 0.3])
BERNOULLI = torch.bernoulli
NAMES = ("first", "second", "third")


def both(ranks: tuple[int, int, int]):
    """Two models with the same three LoRAs: ours, and one of PEFT."""
    own = plain("bert")
    adapters.init(own)
    other = None
    for name, rank, alpha in zip(NAMES, ranks, (4, 6, 8), strict=True):
        own.add_adapter(name, LoRAConfig(r=rank, alpha=alpha, attn_matrices=["q", "k", "v"]))
        disturb(own, name, 0.5)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["query", "key", "value"])
        if other is None:
            other = peft.get_peft_model(plain("bert"), config, name)
        else:
            other.add_adapter(name, config)
        for site, module in own.adapter_sites.holding(name):
            layer = other.base_model.model.get_submodule(site.host_path)
            layer.lora_A[name].weight.data.copy_(module.lora_A)
            layer.lora_B[name].weight.data.copy_(module.lora_B)
    return own, other


def seeded_bernoulli(monkeypatch) -> None:
    """The same draws for both: PEFT draws for each adapter at each place, in the order of the places."""
    source = generator("dare")
    monkeypatch.setattr(torch, "bernoulli", lambda tensor: BERNOULLI(tensor, generator=source))


def changes(model, name: str) -> dict[str, torch.Tensor]:
    return {
        site.host_path: module.merged_weight(torch.zeros_like(site.weight))
        for site, module in model.adapter_sites.holding(name)
    }


CASES = [(strategy, "total") for strategy in STRATEGIES]
CASES += [(strategy, "frequency") for strategy in STRATEGIES if "ties" in strategy]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["positive", "negative"])
@pytest.mark.parametrize(("strategy", "method"), CASES)
def test_combinations_are_those_of_peft(strategy: str, weights: list[float], method: str, monkeypatch) -> None:
    alike = "svd" not in strategy and strategy != "cat"
    own, other = both((4, 4, 4) if alike else (2, 3, 4))
    density = None if strategy in ("linear", "cat", "svd") else 0.4
    options = {"svd_rank": 3} if "svd" in strategy else {}
    names = [STRATEGIES[strategy]] + ([strategy] if strategy != "linear" else [])
    seeded_bernoulli(monkeypatch)
    other.add_weighted_adapter(
        list(NAMES), weights, "x", strategy, density=density, majority_sign_method=method, **options
    )
    for name in names:
        seeded_bernoulli(monkeypatch)
        own.average_adapter(
            "x",
            list(NAMES),
            weights,
            combine_strategy=name,
            normalize_weights=False,
            density=density,
            majority_sign_method=method,
            overwrite_ok=True,
            **options,
        )
        for path, change in changes(own, "x").items():
            wanted = other.base_model.model.get_submodule(path).get_delta_weight("x")
            torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-5)
