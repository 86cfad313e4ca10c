"""LoHa, LoKr, FourierFT, VB-LoRA, RandLoRA: PEFT's outputs with PEFT's weights, the formulas, options and messages."""

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import noisy
from tiny_models import EVERYWHERE, MORE_METHODS, adapted, disturb, generator, inputs, output, plain, run

import adapters
from adapters import FourierFTConfig, LoHaConfig, LoKrConfig, RandLoRAConfig, VBLoRAConfig
from adapters.errors import AdapterError, ConfigError
from adapters.methods.lokr import factor_pair

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it
)

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
FIELDS = {"target_modules": TARGETS}
BANK = {"num_vectors": 6, "vector_length": 4}
# ours, PEFT's; widths are 16 and 24
CASES = {
    "loha": (LoHaConfig(r=2, alpha=3, **EVERYWHERE), peft.LoHaConfig(r=2, alpha=3, **FIELDS)),
    "loha_wide": (LoHaConfig(r=7, **EVERYWHERE), peft.LoHaConfig(r=7, **FIELDS)),
    "lokr": (LoKrConfig(r=8, alpha=3, **EVERYWHERE), peft.LoKrConfig(r=8, alpha=3, **FIELDS)),
    "lokr_both": (
        LoKrConfig(r=1, decompose_both=True, **EVERYWHERE),
        peft.LoKrConfig(r=1, decompose_both=True, **FIELDS),
    ),
    "lokr_factor": (
        LoKrConfig(r=2, decompose_factor=8, **EVERYWHERE),
        peft.LoKrConfig(r=2, decompose_factor=8, **FIELDS),
    ),
    "fourierft": (
        FourierFTConfig(n_frequency=100, scaling=20, random_loc_seed=5, **EVERYWHERE),
        peft.FourierFTConfig(n_frequency=100, scaling=20, random_loc_seed=5, **FIELDS),
    ),
    "vblora": (VBLoRAConfig(topk=3, **BANK, **EVERYWHERE), peft.VBLoRAConfig(topk=3, **BANK, **FIELDS)),
    "randlora": (RandLoRAConfig(r=3, alpha=4, **EVERYWHERE), peft.RandLoraConfig(r=3, randlora_alpha=4, **FIELDS)),
}
each_case = pytest.mark.parametrize("name", CASES)


def theirs(name: str):
    """PEFT's model with noise on its adapter."""
    return noisy(plain("bert"), CASES[name][1], generator(name))


@torch.no_grad()
def ours(name: str, other):
    """Our model with PEFT's weights."""
    model = adapted("bert")
    model.add_adapter("x", CASES[name][0], set_active=True)
    for site, module in model.adapter_sites.holding("x"):
        host = other.base_model.model.get_submodule(site.host_path)
        for key, parameter in module.named_parameters():
            parameter.copy_(getattr(host, key)["default"])
    for shared in model.adapter_sites.shared("x").values():
        for key, tensor in shared.named_parameters():
            tensor.copy_(getattr(other.base_model, key)["default"])
        for key, tensor in shared.named_buffers():
            if key.startswith("randlora"):
                larger = getattr(other.base_model, key)["default"].flatten(1)  # PEFT's bases have rows nobody needs
                tensor.copy_(larger[: tensor.shape[0], : tensor.shape[1]])
    return model.eval()


def deltas(model):
    """The change of each weight that PEFT makes, by the path of the map."""
    layers = (item for item in model.base_model.model.named_modules() if isinstance(item[1], BaseTunerLayer))
    return {path: layer.get_delta_weight("default") for path, layer in layers}


@each_case
def test_outputs_and_gradients_are_those_of_peft(name: str) -> None:
    other, batch = theirs(name), inputs("bert")
    model = ours(name, other)
    torch.testing.assert_close(output(model, batch), output(other, batch), rtol=1e-5, atol=1e-5)
    model.train_adapter("x")
    model.eval()
    for each in (model, other):
        hidden = each(**batch)[0]
        (hidden * torch.randn(hidden.shape, generator=generator("loss"))).sum().backward()
    for site, module in model.adapter_sites.holding("x"):
        host = other.base_model.model.get_submodule(site.host_path)
        for key, parameter in module.named_parameters():
            expected = getattr(host, key)["default"].grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)
    for shared in model.adapter_sites.shared("x").values():
        for key, parameter in shared.named_parameters():
            expected = getattr(other.base_model, key)["default"].grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)


@each_case
def test_the_merged_weight_is_that_of_peft(name: str) -> None:
    other = theirs(name)
    model, expected = ours(name, other), deltas(other)
    found = {site.host_path: module.merged_weight(site.weight) - site.weight for site, module in holding(model)}
    assert sorted(found) == sorted(expected)
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-5)


def holding(model):
    return model.adapter_sites.holding("x")


@each_case
def test_the_change_is_the_product_with_delta(name: str) -> None:
    """Every form of the product (in factors, as one matrix, kept or not, in place) is x ΔWᵀ."""
    model = adapted("bert")
    model.add_adapter("x", CASES[name][0])
    disturb(model, "x")
    for site, module in holding(model):
        for rows in (1, 50):
            x, before = torch.randn(rows, 3, site.inputs), torch.randn(rows, 3, site.outputs)
            expected = before + x @ module.delta().T
            for gradients in (True, False):
                for owned in (False, not gradients):
                    with torch.set_grad_enabled(gradients):
                        signal = adapters.signals.LinearSignal(None, x, before.clone(), owned)
                        torch.testing.assert_close(module(signal).output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["loha", "loha_wide", "lokr", "fourierft", "vblora", "randlora"])
def test_a_change_of_a_parameter_is_seen(name: str) -> None:
    model, batch = adapted("bert"), inputs("bert")
    model.add_adapter("x", MORE_METHODS[name])
    disturb(model, "x")
    before = run(model, batch, "x")
    assert torch.equal(run(model, batch, "x"), before)
    disturb(model, "x")
    assert not torch.equal(run(model, batch, "x"), before)


@pytest.mark.parametrize("name", ["loha", "loha_wide", "lokr", "fourierft", "vblora", "randlora"])
def test_parameters_of_another_dtype(name: str) -> None:
    """Single precision in a model of half precision; its outputs stay halves."""
    model, batch = adapted("bert").to(torch.bfloat16), inputs("bert")
    model.add_adapter("x", MORE_METHODS[name].replace(dtype="float32"))
    disturb(model, "x")
    assert {p.dtype for _, module in holding(model) for p in module.parameters()} == {torch.float32}
    found = run(model, batch, "x")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), run(model.float(), batch, "x"), rtol=0.1, atol=0.25)


def test_fourierft_is_the_inverse_transform() -> None:
    """Against the complex transform of the full spectrum, for even and odd widths."""
    for outputs, inputs_ in ((6, 8), (5, 7), (4, 5), (7, 6)):
        config = FourierFTConfig(n_frequency=outputs * inputs_ // 2, scaling=3, random_loc_seed=1)
        site = type("Map", (), {"outputs": outputs, "inputs": inputs_, "path": ""})()
        cls = adapters.method.methods_of(config)[0]
        module = cls(config, site, cls.share(config, [site]))
        torch.nn.init.normal_(module.fourierft_spectrum)
        drawn = torch.randperm(outputs * inputs_, generator=torch.Generator().manual_seed(1))[: config.n_frequency]
        spectrum = torch.zeros(outputs * inputs_)
        spectrum[drawn] = module.fourierft_spectrum.detach()
        expected = torch.fft.ifft2(spectrum.view(outputs, inputs_)).real * 3
        torch.testing.assert_close(module.delta(), expected)


def test_factor_pairs_are_those_of_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    for width in range(1, 200):
        for wanted in (-1, 1, 2, 3, 4, 8, 16, 100):
            assert factor_pair(width, wanted) == factorization(width, wanted), (width, wanted)


@pytest.mark.parametrize("name", ["vblora", "randlora", "fourierft"])
def test_what_is_shared_is_held_once(name: str) -> None:
    model = adapted("bert")
    model.add_adapter("x", MORE_METHODS[name])
    (shared,) = model.adapter_sites.shared("x").values()
    own = [tensor for _, module in holding(model) for tensor in (*module.parameters(), *module.buffers())]
    assert not {id(tensor) for tensor in own} & {id(tensor) for tensor in (*shared.parameters(), *shared.buffers())}
    model.double()
    batch = inputs("bert")
    with torch.no_grad(), adapters.AdapterSetup("x"):
        assert model(**batch)[0].dtype == torch.float64


@pytest.mark.parametrize("bases", ["dense", "sparse", "very_sparse"])
def test_random_bases(bases: str) -> None:
    """They depend on their key alone; sparse ones have three values. In files only if they are asked for."""
    found = []
    for key in (1, 1, 2):
        model = adapted("bert")
        model.add_adapter("x", RandLoRAConfig(r=4, bases=bases, projection_prng_key=key, save_projection=key == 1))
        (shared,) = model.adapter_sites.shared("x").values()
        found.append(shared.randlora_B)
        assert any("randlora_B" in name for name in model.state_dict()) == (key == 1)
        assert shared.randlora_B.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    if bases != "dense":
        assert len(found[0].unique()) == 3


def test_bases_that_are_not_saved_are_drawn_again(tmp_path) -> None:
    model, batch = adapted("bert"), inputs("bert")
    model.add_adapter("x", RandLoRAConfig(r=4, save_projection=False))
    disturb(model, "x")
    model.save_adapter(tmp_path, "x")
    other = adapted("bert")
    other.load_adapter(tmp_path)
    assert torch.equal(run(other, batch, "x"), run(model, batch, "x"))


@pytest.mark.parametrize("method", ["loha", "lokr", "fourierft"])
def test_random_start(method: str) -> None:
    config = MORE_METHODS[method].replace(init_weights="random", init_weights_seed=1)
    model, batch = adapted("bert"), inputs("bert")
    model.add_adapter("x", config)
    assert (run(model, batch, "x") - output(model, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("both", [False, True])
def test_lokr_starts_as_the_identity_in_both_ways(both: bool) -> None:
    zero = {"identity": "lokr_w1_a" if both else "lokr_w1", "lycoris": "lokr_w2_b"}
    for way, name in zero.items():
        model, batch = adapted("bert"), inputs("bert")
        model.add_adapter("x", LoKrConfig(r=1, decompose_both=both, init_weights=way))
        assert torch.equal(run(model, batch, "x"), output(model, batch))
        for _, module in holding(model):
            assert [key for key, value in module.named_parameters() if not value.any()] == [name]


@pytest.mark.parametrize("config", [LoHaConfig(r=2), LoHaConfig(r=7), LoKrConfig(r=2, rank_dropout_scale=True)])
def test_rank_and_module_dropout(config) -> None:
    """In training some outputs are left alone and the others enlarged, or all are; in eval mode none is."""
    for share, field in ((0.5, "rank_dropout"), (0.5, "module_dropout")):
        model = adapted("bert")
        model.add_adapter("x", config.replace(**{field: share}))
        disturb(model, "x")
        module = holding(model)[0][1]
        signal = adapters.signals.LinearSignal(None, torch.randn(2, 3, 16), torch.zeros(2, 3, 16))
        whole = module.eval()(signal).output
        torch.manual_seed(0)
        factors = torch.stack([(module.train()(signal).output / whole)[0, 0] for _ in range(100)]).round(decimals=3)
        dropped = factors == 0
        assert 0.3 < dropped.float().mean() < 0.7
        if field == "module_dropout":
            assert ((dropped.sum(1) == 0) | (dropped.sum(1) == 16)).all()
        else:
            kept = (~dropped).sum(1, keepdim=True)
            torch.testing.assert_close(factors, torch.where(dropped, 0, 16 / kept), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (LoHaConfig, {"r": 0}, r"LoHaConfig\(r=0\): 0 is out of range; it must be an integer >= 1"),
        (LoHaConfig, {"rank_dropout": 1.0}, r"rank_dropout=1.0"),
        (LoHaConfig, {"init_weights": "zeros"}, r"init_weights='zeros'.*'identity'"),
        (LoKrConfig, {"decompose_factor": 0}, r"decompose_factor=0.*>= 1, or -1"),
        (LoKrConfig, {"module_dropout": -0.1}, r"module_dropout=-0.1"),
        (FourierFTConfig, {"n_frequency": 0}, r"n_frequency=0"),
        (FourierFTConfig, {"random_loc_seed": 1.5}, r"random_loc_seed=1.5.*no seed"),
        (VBLoRAConfig, {"topk": 7, "num_vectors": 6}, r"topk=7.*at most num_vectors=6"),
        (VBLoRAConfig, {"init_logits_std": 0}, r"init_logits_std=0.*> 0"),
        (RandLoRAConfig, {"bases": "thin"}, r"bases='thin'.*very_sparse"),
        (RandLoRAConfig, {"projection_prng_key": True}, r"projection_prng_key=True.*no seed"),
        (RandLoRAConfig, {"attn_matrices": ["x"]}, r"attn_matrices"),
    ],
)
def test_wrong_values_are_refused(config, fields, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FourierFTConfig(n_frequency=257), r"n_frequency=257.*query has only 256 entries; choose n_frequency up to"),
        (VBLoRAConfig(vector_length=5), r"vector_length=5.*query has 16 inputs, which 5 does not divide"),
    ],
)
def test_maps_that_do_not_fit_are_refused(config, message: str) -> None:
    model = adapted("bert")
    with pytest.raises(AdapterError, match=message):
        model.add_adapter("x", config)
    assert not model.adapters_config.adapters


def test_two_members_that_share_under_one_name_are_refused() -> None:
    union = adapters.ConfigUnion(
        VBLoRAConfig(r=2, **BANK), RandLoRAConfig(r=3, selfattn_lora=False, intermediate_lora=True)
    )
    model = adapted("bert")
    with pytest.raises(AdapterError, match=r"share, under one name, shared_parameters.*use Stack"):
        model.add_adapter("x", union)
    assert not model.adapters_config.adapters
    assert not [key for key in model.state_dict() if "shared" in key]
