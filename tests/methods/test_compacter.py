"""Compacter: the hypercomplex projections against sums of Kronecker products, every option, what is shared."""

import itertools

import pytest
import torch
from tiny_models import adapted, disturb, inputs, output, plain, run

from adapters import CompacterConfig, CompacterPlusPlusConfig
from adapters.errors import AdapterError

SMALL = {"reduction_factor": 4, "phm_dim": 2, "phm_rank": 3}
SWITCHES = ("factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_bias", "learn_phm")
OPTIONS = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product((True, False), repeat=6)]


def with_compacter(name: str = "bert", **fields):
    model = adapted(name)
    model.add_adapter("a", CompacterPlusPlusConfig(**{**SMALL, **fields}))
    return model


def adapted_from(folder):
    model = adapted("bert")
    model.load_adapter(folder)
    return model


def tensors(model) -> dict[str, torch.Tensor]:
    """All that is shared, and the tensors of one layer as `down.…` and `up.…`."""
    layers = model.get_adapter("a")
    module = layers[1]["output_adapter"]
    own = {f"down.{name}": tensor for name, tensor in module.adapter_down[0].state_dict().items()}
    own |= {f"up.{name}": tensor for name, tensor in module.adapter_up.state_dict().items()}
    return own | (layers[-1]["shared"].state_dict() if -1 in layers else {})


def matrix(found: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    """H (in, out) of the part, written out."""

    def read(*names: str) -> torch.Tensor:
        for name in names:
            if name in found:
                return found[name]
            if f"{name}_left" in found:
                return found[f"{name}_left"] @ found[f"{name}_right"]
        raise KeyError(names)

    rules, weights = read(f"{part}.phm_rule", "phm_rule"), read(f"{part}.W", f"W_{part}")
    return sum(torch.kron(rule, weight) for rule, weight in zip(rules, weights, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "".join(str(int(value)) for value in options.values()))
def test_every_combination_is_the_sum_of_kronecker_products(options, tmp_path):
    model = with_compacter(**options)
    disturb(model, "a")
    module, found = model.get_adapter("a")[1]["output_adapter"], tensors(model)
    for part, layer, width in (("down", module.adapter_down[0], 16), ("up", module.adapter_up, 4)):
        x = torch.randn(2, 3, width)
        wanted = x @ matrix(found, part) + found.get(f"{part}.b", 0)
        torch.testing.assert_close(layer(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted)
    model.train_adapter("a")
    rules = [tensor for name, tensor in model.named_parameters() if "phm_rule" in name]
    assert bool(rules) == options["learn_phm"] and all(rule.requires_grad for rule in rules)
    model.eval()
    model.save_adapter(tmp_path, "a")
    other = adapted("bert")
    other.load_adapter(tmp_path, set_active=True)
    assert torch.equal(output(other, inputs("bert")), output(model, inputs("bert")))


def test_what_is_kept_without_gradients_follows_the_parameters():
    model, batch = with_compacter(), inputs("bert")
    disturb(model, "a")
    before = run(model, batch, "a")
    assert torch.equal(run(model, batch, "a"), before)
    with torch.no_grad():
        model.get_adapter("a")[-1]["shared"].phm_rule.mul_(2)
    assert not torch.equal(run(model, batch, "a"), before)


def test_a_rule_of_zero_gives_the_bias():
    model = with_compacter()
    disturb(model, "a")
    with torch.no_grad():
        model.get_adapter("a")[-1]["shared"].phm_rule.zero_()
    layer = model.get_adapter("a")[0]["output_adapter"].adapter_up
    assert torch.equal(layer(torch.randn(5, 4)), layer.b.expand(5, -1))


def test_shared_tensors_are_held_once():
    model = with_compacter(shared_W_phm=True)
    names = [name for name, _ in model.named_parameters() if ".a." in name]
    shared = {name for name in names if name.startswith("shared_parameters.a.")}
    assert {name.rsplit(".", 1)[1] for name in shared} == {
        "phm_rule", "W_down_left", "W_down_right", "W_up_left", "W_up_right"
    }  # fmt: skip
    assert {name.rsplit(".", 1)[1] for name in names if name not in shared} == {"b"}


def spread(options, name: str) -> tuple[float, float]:
    """Standard deviation and largest value of the tensors of a new, wide adapter."""
    model = with_compacter(**{"phm_dim": 4, "reduction_factor": 1, "phm_rank": 40, **options})
    values = torch.cat([tensor.flatten() for key, tensor in tensors(model).items() if key.endswith(name)])
    return values.std().item(), values.abs().max().item()


def test_c10_every_start_is_the_configured_one():
    rows, columns = 4, 40
    glorot = (2 / (rows + columns)) ** 0.5
    torch.manual_seed(0)
    deviation, largest = spread({}, "W_left")
    assert deviation == pytest.approx(glorot, rel=0.1) and largest <= glorot * 3**0.5
    deviation, largest = spread({"hypercomplex_nonlinearity": "glorot-normal"}, "W_left")
    assert deviation == pytest.approx(glorot, rel=0.1) and largest > glorot * 2
    assert spread({"hypercomplex_nonlinearity": "normal"}, "W_left")[0] == pytest.approx(1e-4, rel=0.1)
    deviation, largest = spread({"hypercomplex_nonlinearity": "phm"}, "W_left")
    assert deviation > 0.01 and largest <= (2 * (rows + columns)) ** -0.5
    assert spread({"init_weights": "houlsby"}, "W_left")[1] <= 0.02
    assert spread({}, "phm_rule")[1] < 6e-4
    assert 0.3 < spread({"phm_c_init": "uniform"}, "phm_rule")[1] <= 1
    assert 2e-3 < spread({"phm_c_init": "uniform", "shared_phm_rule": False}, "phm_rule")[1] <= 0.01


def test_c10_mam_starts_as_the_identity():
    batch = inputs("bert")
    for shared in (True, False):
        model = with_compacter(init_weights="mam_adapter", shared_W_phm=shared)
        torch.testing.assert_close(run(model, batch, "a"), output(plain("bert"), batch))


def test_c10_shared_tensors_follow_the_seed():
    found = [tensors(with_compacter(init_weights_seed=5, shared_W_phm=True)) for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"phm_dim": 3}, "phm_dim=3 does not divide both 16 and 4, the widths of a projection"),
        ({"reduction_factor": 8, "phm_dim": 4}, "phm_dim=4 does not divide both 16 and 2"),
        ({"shared_W_phm": True, "reduction_factor": {"0": 4, "1": 8}}, r"\[\(16, 2\), \(16, 4\)\]; one shared W needs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(fields, message):
    model = adapted("bert")
    with pytest.raises(AdapterError, match=message):
        model.add_adapter("a", CompacterConfig(**{**SMALL, **fields}))
    assert "a" not in model.adapters_config and not [name for name, _ in model.named_parameters() if ".a." in name]


def test_f4_a_base_model_saves_what_is_shared(tmp_path):
    model, batch = with_compacter(), inputs("bert")
    disturb(model, "a")
    model.save_adapter(tmp_path, "a", use_safetensors=False)
    file = tmp_path / "pytorch_adapter.bin"
    weights = torch.load(file, weights_only=True)
    assert "shared_parameters.a.phm_rule" in weights
    for head in (False, True):
        other = adapted("bert", head=head)
        other.load_adapter(tmp_path)
        assert all(torch.equal(tensor, tensors(model)[name]) for name, tensor in tensors(other).items())
    assert torch.equal(run(adapted_from(tmp_path), batch, "a"), run(model, batch, "a"))
    del weights["shared_parameters.a.phm_rule"]  # as 1.x wrote it
    torch.save(weights, file)
    with pytest.warns(UserWarning, match="1 tensors are not in the file .*shared_parameters.a.phm_rule"):
        adapted("bert").load_adapter(tmp_path)
