"""Unions of any methods, their gates, and the fields that every method has."""

from itertools import combinations

import pytest
import torch
from tiny_models import CONFIGS, METHODS, MORE_METHODS, REFUSED, adapted, changed, disturb, inputs, output, run

from adapters import (
    AdapterConfig,
    AdapterError,
    BnConfig,
    ConfigUnion,
    LoRAConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    Stack,
    UniPELTConfig,
)

ALL = {**METHODS, **MORE_METHODS}
SINGLE = {method: config for method, config in ALL.items() if not isinstance(config, ConfigUnion)}


def kinds() -> dict[str, AdapterConfig]:
    """One method of each architecture of configurations."""
    found: dict = {}
    for method, config in SINGLE.items():
        found.setdefault(config.architecture, (method, config))
    return dict(sorted(found.values(), key=lambda pair: pair[0]))


PAIRS = list(combinations(kinds(), 2))


def sites_of(model, name: str) -> set[str]:
    return {site.path for site, _ in model.adapter_sites.holding(name)}


def shared_of(model, name: str) -> set[str]:
    return {path.removesuffix(f".{name}") for path in model.adapter_sites.shared(name)}


@torch.no_grad()
def copy_weights(model, sources: tuple[str, ...], target: str) -> None:
    """The weights of single adapters into the union of their methods."""
    state = model.state_dict()
    for key, value in state.items():
        for source in sources:
            if f".{source}." in key:
                state[key.replace(f".{source}.", f".{target}.")].copy_(value)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("pair", PAIRS, ids=map("-".join, PAIRS))
def test_a_union_of_two_methods_is_their_stack(name: str, pair: tuple[str, str]) -> None:
    if any(name in REFUSED.get(method, ()) for method in pair):
        pytest.skip("one of them has no place there")
    model, batch = adapted(name), inputs(name)
    for method in pair:
        model.add_adapter(method, ALL[method])
        disturb(model, method)
    first, second = pair
    conflict = sites_of(model, first) & sites_of(model, second) or shared_of(model, first) & shared_of(model, second)
    before = list(model.state_dict())
    if conflict:
        with pytest.raises(AdapterError, match=r"two members of the union|both would sit|share"):
            model.add_adapter("union", ConfigUnion(*(ALL[method] for method in pair)))
        assert list(model.state_dict()) == before
        assert "union" not in model.adapters_config
        return
    model.add_adapter("union", ConfigUnion(*(ALL[method] for method in pair)))
    copy_weights(model, pair, "union")
    torch.testing.assert_close(run(model, batch, "union"), run(model, batch, Stack(*pair)), rtol=1e-5, atol=1e-6)
    rows = {row["name"]: row["#param"] for row in model.adapter_summary(as_dict=True)}
    assert rows["union"] == rows[first] + rows[second]
    model.delete_adapter("union")
    assert list(model.state_dict()) == before


def test_most_pairs_fit_together() -> None:
    assert len(PAIRS) > 20


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("method", [method for method, config in SINGLE.items() if "leave_out" in config])
def test_layers_are_left_out(name: str, method: str) -> None:
    if name in REFUSED.get(method, ()):
        pytest.skip("it has no place there")
    model = adapted(name)
    model.add_adapter("whole", SINGLE[method])
    model.add_adapter("part", changed(SINGLE[method], leave_out=[0]))
    layers, left = (sorted({site.layer for site, _ in model.adapter_sites.holding(x)}) for x in ("whole", "part"))
    assert left == [layer for layer in layers if layer != 0]
    with pytest.raises(AdapterError, match="has no layer 9"):
        model.add_adapter("none", changed(SINGLE[method], leave_out=[9]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reduction_factor_for_each_layer(name: str, tmp_path) -> None:
    model = adapted(name)
    config = BnConfig(
        mh_adapter=True, output_adapter=True, non_linearity="relu", reduction_factor={"0": 2, "default": 8}
    )
    model.add_adapter("a", config)
    for site, module in model.adapter_sites.holding("a"):
        factor = 2 if site.layer == 0 else 8
        assert module.adapter_up.weight.shape == (site.width, site.width // factor)
    disturb(model, "a")
    model.save_adapter(tmp_path, "a")
    other = adapted(name)
    other.load_adapter(tmp_path)
    assert torch.equal(run(other, inputs(name), "a"), run(model, inputs(name), "a"))


def gates(model, batch) -> dict:
    with torch.no_grad():
        return model(**batch, output_adapter_gating_scores=True)["adapter_gating_scores"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gates_of_several_maps_stand_in_the_order_q_k_v(name: str) -> None:
    """As 1.3.0 has them, on separate projections and on a fused one."""
    model, batch = adapted(name), inputs(name)
    model.add_adapter("a", LoRAConfig(r=2, use_gating=True, attn_matrices=["v", "q"]), set_active=True)
    disturb(model, "a")
    seen = {}
    layer = model.encoder.layer[0] if name == "bert" else model.h[0]
    attention = layer.attention.self.query if name == "bert" else layer.attn.c_attn
    handle = attention.register_forward_pre_hook(lambda module, args: seen.setdefault("x", args[0]))
    scores = gates(model, batch)["a"][0]["selfattn_lora"]
    handle.remove()
    mask = batch["attention_mask"][:, :, None].float()
    modules = {site.role: module for site, module in model.adapter_sites.holding("a") if site.layer == 0}
    for column, role in enumerate("qv"):
        gate = torch.sigmoid(modules[role].gate(seen["x"]))
        expected = (gate * mask).sum(1)[:, 0] / mask.sum(1)[:, 0]
        torch.testing.assert_close(torch.from_numpy(scores[:, column]), expected.detach(), rtol=1e-5, atol=1e-6)


def test_every_gate_of_unipelt_is_reported() -> None:
    config = UniPELTConfig(
        PrefixTuningConfig(prefix_length=2, bottleneck_size=4, shared_gating=False),
        SeqBnConfig(reduction_factor=4),
        LoRAConfig(r=2, intermediate_lora=True),
    )
    model = adapted("t5")
    model.add_adapter("a", config, set_active=True)
    scores = gates(model, inputs("t5"))["a"]
    shapes = {layer: {place: values.shape for place, values in places.items()} for layer, places in scores.items()}
    common = {"intermediate_lora": (4,), "output_adapter": (4,)}
    encoder = {"selfattn_lora": (4, 2), "encoder_prefix": (4, 2), **common}
    decoder = {"selfattn_lora": (4, 4), "self_prefix": (4, 2), "cross_prefix": (4, 2), **common}
    assert shapes == {0: encoder, 1: encoder, 2: decoder, 3: decoder}


@pytest.mark.parametrize("method", ["mam", "unipelt"])
@pytest.mark.parametrize("name", CONFIGS)
def test_unions_of_papers_act_with_all_their_members(name: str, method: str) -> None:
    model, batch = adapted(name, method), inputs(name)
    whole, base = run(model, batch, method), output(model, batch)
    for site_kind in {type(site) for site, _ in model.adapter_sites.holding(method)}:
        other = adapted(name, method)
        with torch.no_grad():
            for site, module in other.adapter_sites.holding(method):
                if type(site) is site_kind:
                    for parameter in module.parameters():
                        parameter.add_(1)
            for module in other.adapter_sites.shared(method).values():
                for parameter in module.parameters():
                    parameter.add_(0.5)
        assert (run(other, batch, method) - whole).abs().max() > 1e-4
    assert (whole - base).abs().max() > 1e-3
