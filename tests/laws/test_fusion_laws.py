"""AdapterFusion: which adapters go together, every field of its configuration, reports, files, training."""

import itertools

import pytest
import torch
from tiny_models import CONFIGS, METHODS, adapted, disturb, inputs, output, rows_of, run

from adapters import AdapterConfig, Average, Fuse, MultiTask, Parallel, Stack, load_model
from adapters.methods.fusion import DynamicAdapterFusionConfig, Fusion

KINDS: dict[str, AdapterConfig] = {
    **{name: METHODS[name] for name in ("seq_bn", "par_bn", "scaled_par_bn", "adapter_plus")},
    "wide": AdapterConfig.load("seq_bn[reduction_factor=2,non_linearity='gelu']"),
    "compacter": AdapterConfig.load("compacter++[reduction_factor=4,phm_dim=2]"),
}
PAIRS = list(itertools.permutations(KINDS, 2))


def model_of(name: str, *kinds: str):
    model = adapted(name)
    for kind in kinds:
        model.add_adapter(kind, KINDS[kind])
        disturb(model, kind)
    return model.eval()


def stir(fusion: Fusion) -> None:
    torch.manual_seed(0)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize(("pair", "name"), list(zip(PAIRS, itertools.cycle(CONFIGS))), ids=str)
def test_bottlenecks_of_all_kinds_are_fused(pair: tuple[str, str], name: str) -> None:
    """In closed form: sum_i p_i u_i, with the u_i that each adapter reports and the p_i that the fusion does."""
    model, batch, fuse = model_of(name, *pair), inputs(name), Fuse(*pair)
    model.add_adapter_fusion(fuse, {**DynamicAdapterFusionConfig().to_dict(), "value": False, "query": True})
    for layer in model.adapter_sites.fusion_layers():
        stir(layer)
    found = run(model, batch, fuse)
    for other in (Average(*pair), *pair, None):
        assert (found - run(model, batch, other)).abs().max() > 1e-3
    rows = [run(model, rows_of(batch, [row]), fuse) for row in range(4)]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=2e-5)
    again = run(model, batch, Fuse(Stack(pair[0]), pair[1], name=fuse.name))  # each by itself, not side by side
    torch.testing.assert_close(found, again, rtol=1e-4, atol=2e-5)


FIELDS = ("key", "query", "value", "query_before_ln", "residual_before", "temperature", "value_before_softmax")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_field_counts_and_both_ways_to_compute_agree(field: str, name: str) -> None:
    model, batch, fuse = model_of(name, "seq_bn", "wide"), inputs(name), Fuse("seq_bn", "wide")
    model.add_adapter("twin", KINDS["seq_bn"])
    disturb(model, "twin")
    outputs = []
    for value in (True, False):
        config = DynamicAdapterFusionConfig(value_before_softmax=field != "residual_before")
        changed = config.replace(**{field: value})
        for pair in (fuse, Fuse("seq_bn", "twin")):
            model.add_adapter_fusion(pair, changed, overwrite_ok=True)
            for layer in model.adapter_sites.fusion_layers():
                stir(layer)
        found = run(model, batch, Fuse("seq_bn", "twin"))
        apart = run(model, batch, Fuse(Stack("seq_bn"), "twin", name="seq_bn,twin"))
        torch.testing.assert_close(found, apart, rtol=1e-4, atol=2e-5)
        outputs.append(found)
    if field != "value_before_softmax" and not (field == "query_before_ln" and name == "gpt2"):
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_regularisation_starts_near_zero_and_is_that_of_trained_fusions() -> None:
    model, batch = model_of("bert", "seq_bn", "par_bn", "wide"), inputs("bert")
    first, second = Fuse("seq_bn", "par_bn"), Fuse("par_bn", "wide")
    for fuse, config in ((first, "dynamic"), (second, "dynamic")):
        model.add_adapter_fusion(fuse, config)
    model.train_adapter_fusion(first)
    near = model.get_fusion_regularization_loss()
    assert 0 <= near.item() < 1e-4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layers = [site.fusions[first.name] for site in model.adapter_sites.fusion_sites(first.name)]
    torch.nn.init.normal_(layers[0].value.weight)
    before = model.get_fusion_regularization_loss().item()
    expected = 0.01 * (torch.eye(16) - layers[0].value.weight).pow(2).sum()
    assert before == pytest.approx(expected.item(), rel=1e-4)
    for _ in range(20):  # a loop of one's own: the loss is added by hand
        loss = 1e-3 * model(**batch)[0].square().mean() + model.get_fusion_regularization_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.get_fusion_regularization_loss().item() < 0.95 * before
    model.train_adapter_fusion(Stack("seq_bn", second))
    assert model.get_fusion_regularization_loss().item() < 1e-4
    model.train_adapter("seq_bn")
    assert model.get_fusion_regularization_loss() is None


A, B = Fuse("seq_bn", "par_bn"), Fuse("par_bn", "wide")
REPORTS = {
    "alone": (A, {"seq_bn,par_bn": 4}, {}),
    "in a stack": (Stack("wide", A), {"seq_bn,par_bn": 4}, {}),
    "two in a stack": (Stack(A, B), {"seq_bn,par_bn": 4, "par_bn,wide": 4}, {}),
    "by task": (MultiTask(A, B), {"seq_bn,par_bn": 3, "par_bn,wide": 1}, {"task_ids": torch.tensor([0, 1, 0, 0])}),
    "one for all tasks": (MultiTask(A, A), {"seq_bn,par_bn": 4}, {"task_ids": torch.tensor([0, 1, 0, 0])}),
    "by row": (None, {"seq_bn,par_bn": 3, "par_bn,wide": 1}, {"adapter_names": [A, Stack("wide", A), B, A]}),
    "of no row": (None, {}, {"adapter_names": ["wide", None, "wide", None]}),
}


@pytest.mark.parametrize("case", REPORTS)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_attentions_are_reported_in_every_nesting(case: str, name: str) -> None:
    model, batch = model_of(name, "seq_bn", "par_bn", "wide"), inputs(name)
    for fuse in (A, B):
        model.add_adapter_fusion(fuse, "static")
    for layer in model.adapter_sites.fusion_layers():
        stir(layer)
    setup, rows, more = REPORTS[case]
    model.set_active_adapters(setup)
    found = model(**batch, **more, output_adapter_fusion_attentions=True)["adapter_fusion_attentions"]
    assert {fusion: len(layers[0]["output_adapter"]) for fusion, layers in found.items()} == rows
    for layers in found.values():
        assert sorted(layers) == list(range(4 if name == "t5" else 2))
        for weights in (array for places in layers.values() for array in places.values()):
            torch.testing.assert_close(torch.from_numpy(weights).sum(-1), torch.ones(weights.shape[:2]))
    if case == "by row":
        alone = model(**rows_of(batch, [3]), adapter_names=A, output_adapter_fusion_attentions=True)
        expected = alone["adapter_fusion_attentions"][A.name][0]["output_adapter"][0]
        torch.testing.assert_close(torch.from_numpy(found[A.name][0]["output_adapter"][2]), torch.from_numpy(expected))


def test_a_fusion_visited_twice_is_reported_twice() -> None:
    model, batch = model_of("bert", "seq_bn", "par_bn"), inputs("bert")
    model.add_adapter_fusion(A, "static")
    model.set_active_adapters(Stack(A, A))
    found = model(**batch, output_adapter_fusion_attentions=True)["adapter_fusion_attentions"]
    assert found[A.name][0]["output_adapter"].shape == (4, 6, 4)
    model.set_active_adapters(Parallel("seq_bn", "par_bn"))
    assert model(**batch, output_adapter_fusion_attentions=True)["adapter_fusion_attentions"] == {}


def test_fusions_outlive_their_adapters_and_are_saved(tmp_path) -> None:
    model, batch = model_of("bert", "seq_bn", "par_bn", "wide"), inputs("bert")
    for fuse in (A, B):
        model.add_adapter_fusion(fuse, "dynamic")
    for layer in model.adapter_sites.fusion_layers():
        stir(layer)
    expected = run(model, batch, A), run(model, batch, B)
    model.save_all_adapter_fusions(str(tmp_path / "fusions"))
    model.save_all_adapters(str(tmp_path / "adapters"))
    other = adapted("bert")
    for name in ("seq_bn", "par_bn", "wide"):
        other.load_adapter(str(tmp_path / "adapters" / name))
    for name in (A.name, B.name):
        other.load_adapter_fusion(str(tmp_path / "fusions" / name))
    assert torch.equal(run(other.eval(), batch, A), expected[0])
    other.delete_adapter("seq_bn")  # the fusions of it stay, for when it comes back
    assert torch.equal(run(other, batch, B), expected[1])
    assert A.name in other.adapters_config.fusions
    other.save_pretrained(tmp_path / "whole")
    whole = load_model(str(tmp_path / "whole"), type(other)).eval()
    assert torch.equal(run(whole, batch, B), expected[1])
    other.load_adapter(str(tmp_path / "adapters" / "seq_bn"))
    assert torch.equal(run(other.eval(), batch, A), expected[0])
    other.delete_adapter_fusion(["seq_bn", "par_bn"])
    assert list(other.adapters_config.fusions) == [B.name]
    assert torch.equal(run(other, batch, B), expected[1])
    assert torch.equal(output(other, batch), run(other, batch, None))
