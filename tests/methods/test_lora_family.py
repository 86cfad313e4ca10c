"""(IA)³, VeRA, DoRA, DvoRA, MTL-LoRA: PEFT's outputs and gradients with PEFT's weights, formulas, options, messages."""

import copy
import math

import peft
import pytest
import torch
from peft_models import noisy
from tiny_models import CONFIGS, EVERYWHERE, LORA_FAMILY, MORE_METHODS, adapted, disturb, generator, inputs, plain, run

import adapters
from adapters import AdapterError, ConfigError, LoRAConfig, MTLLoRAConfig, MultiTask, VeraConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it
)

TARGETS = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
}
# ours, PEFT's, and what the parameters of ours are called there
CASES = {
    "ia3": (
        LoRAConfig(r=1, alpha=1, composition_mode="scale", init_weights="ia3", **EVERYWHERE),
        lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        {"lora_B": "ia3_l"},
    ),
    "vera": (
        VeraConfig(r=3, alpha=3, **EVERYWHERE),
        lambda targets: peft.VeraConfig(r=3, target_modules=targets),
        {"vera_D": "vera_lambda_d", "vera_B": "vera_lambda_b", "shared.lora_A": "vera_A", "shared.lora_B": "vera_B"},
    ),
    "dora": (
        LoRAConfig(r=3, alpha=7, use_dora=True, **EVERYWHERE),
        lambda targets: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=targets),
        {"lora_A": "lora_A", "lora_B": "lora_B", "m.weight": "lora_magnitude_vector"},
    ),
}


def value(entry):
    return entry.weight if isinstance(entry, torch.nn.Module) else entry


@torch.no_grad()
def biased(model):
    """The model with biases, which are 0 in a new one."""
    source = generator("bias")
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.add_(torch.randn(parameter.shape, generator=source))
    return model


def theirs(name: str, method: str):
    """PEFT's model with noise on its adapter."""
    return noisy(biased(plain(name)), CASES[method][1](TARGETS[name]), generator(method))


def ours(name: str, method: str, other):
    """Our model with PEFT's weights, and each of our parameters with PEFT's."""
    model, pairs = biased(adapted(name)), []
    config, _, names = CASES[method]
    model.add_adapter("x", config)
    model.train_adapter("x")
    with torch.no_grad():
        for site, module in model.adapter_sites.holding("x"):
            host = other.base_model.model.get_submodule(site.host_path)
            for key, parameter in module.named_parameters():
                wanted = value(getattr(host, names[key])["default"])
                parameter.copy_(wanted.reshape(parameter.shape))
                pairs.append((parameter, wanted))
        for shared in model.adapter_sites.shared("x").values():
            for key, tensor in shared.named_buffers():
                tensor.copy_(getattr(other.base_model, names[f"shared.{key}"])["default"])
    return model.eval(), pairs


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("name", TARGETS)
def test_outputs_and_gradients_are_those_of_peft(name: str, method: str) -> None:
    other = theirs(name, method)
    model, pairs = ours(name, method, other)
    batch, losses = inputs(name), []
    for found in (model, other):
        hidden = found(**batch)[0]
        losses.append((hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**batch)[0], other(**batch)[0], rtol=0, atol=1e-5)
    for parameter, wanted in pairs:
        if wanted.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted.grad.view(parameter.shape), rtol=1e-3, atol=1e-4)


def naive(module, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The formulas of the papers, in double precision."""
    parts = {key: tensor.double() for key, tensor in module.state_dict().items()}
    scale = module.config.alpha / module.config.r
    weight, bias, x = weight.double(), bias.double(), x.double()
    if "vera_D" in parts:
        down, up = (matrix.double() for matrix in module.projections())
        delta = torch.diag(parts["vera_B"]) @ up @ torch.diag(parts["vera_D"]) @ down
    elif "weights" in parts:
        mix = torch.exp(parts["weights"] / module.config.weights_sharpness)
        mix, task = mix / mix.sum(), parts["task_specific.values"]
        inner = (task if task.dim() == 2 else torch.diag(task)).T
        delta = sum(share * up for share, up in zip(mix, parts["lora_B"], strict=True)) @ inner @ parts["lora_A"]
    else:
        delta = parts["lora_B"] @ parts["lora_A"]
    changed = weight + scale * delta
    if "m.weight" in parts:
        changed = parts["m.weight"] * changed / torch.linalg.norm(changed, dim=1, keepdim=True)
    return x @ changed.T + bias


@pytest.mark.parametrize("method", LORA_FAMILY)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@torch.no_grad()
def test_each_map_follows_the_formula(name: str, method: str) -> None:
    model = biased(adapted(name))
    model.add_adapter("x", MORE_METHODS[method], set_active=True)
    disturb(model, "x")
    for site, module in model.adapter_sites.holding("x"):
        x = torch.randn(2, 3, site.inputs, generator=generator(site.path))
        found = site.host(x)[..., site.start : site.start + site.outputs]
        bias = torch.zeros(site.outputs) if site.bias is None else site.bias
        torch.testing.assert_close(found, naive(module, site.weight, bias, x).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", ["ia3", *LORA_FAMILY])
def test_merged_is_unmerged_and_reset_is_bit_for_bit(name: str, method: str) -> None:
    model = biased(adapted(name))
    model.add_adapter("x", CASES["ia3"][0] if method == "ia3" else MORE_METHODS[method])
    disturb(model, "x")
    batch = inputs(name)
    base, alone = run(model, batch, None), run(model, batch, "x")
    model.merge_adapter("x")
    torch.testing.assert_close(run(model, batch, None), alone, rtol=1e-4, atol=1e-4)
    model.reset_adapter()
    assert torch.equal(run(model, batch, None), base)
    assert torch.equal(run(model, batch, "x"), alone)


def test_the_projections_of_vera_are_held_once_and_not_trained() -> None:
    model = adapted("llama")
    model.add_adapter("x", VeraConfig(r=3, **EVERYWHERE))
    model.train_adapter("x")
    ((path, shared),) = model.adapter_sites.shared("x").items()
    assert path == "shared_parameters.x"
    assert {key: tuple(tensor.shape) for key, tensor in shared.named_buffers()} == {
        "lora_A": (3, 24),
        "lora_B": (24, 3),
    }
    memory = {shared.lora_A.data_ptr(), shared.lora_B.data_ptr()}
    for _, module in model.adapter_sites.holding("x"):
        assert {matrix.data_ptr() for matrix in module.projections()} == memory
    assert not any(tensor.requires_grad for tensor in shared.buffers())


@pytest.mark.parametrize("values", [{"vera_d": 1, "vera_b": 0}, {"vera_b": 0.0}, {"vera_d": 0.5}])
def test_either_start_value_makes_it_vera_and_scheme_lora_leaves_it_trainable(values) -> None:
    model = adapted("bert")
    model.add_adapter("x", LoRAConfig(r=2, **values))
    (_, module), *_ = model.adapter_sites.holding("x")
    assert (module.vera_D.shape, module.vera_B.shape) == ((2,), (16,))
    assert module.vera_D[0] == values.get("vera_d", 0.1)
    assert module.vera_B[0] == 0
    assert module.projections()[1].any()


@pytest.mark.parametrize("method", ["dora", "vera", "mtl_lora", "mtl_dora"])
def test_the_dtype_of_the_configuration_stays(method: str) -> None:
    model = adapted("gpt2")
    model.add_adapter("x", MORE_METHODS[method].replace(dtype="bfloat16"))
    tensors = [tensor for module in model._modules_of("x") for tensor in module.state_dict().values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    disturb(model, "x")
    assert run(model, inputs("gpt2"), "x").dtype == torch.float32


@pytest.mark.parametrize("method", LORA_FAMILY)
def test_an_open_gate_changes_nothing_and_a_closed_one_closes(method: str) -> None:
    model, config = adapted("bert"), MORE_METHODS[method].replace(init_weights_seed=3)
    model.add_adapter("plain", config)
    disturb(model, "plain")
    model.add_adapter("gated", config.replace(use_gating=True))
    with torch.no_grad():
        for site, module in model.adapter_sites.holding("gated"):
            module.load_state_dict(site.adapters["plain"].state_dict(), strict=False)
            module.gate.weight.zero_()
            module.gate.bias.fill_(50.0)
    batch = inputs("bert")
    torch.testing.assert_close(run(model, batch, "gated"), run(model, batch, "plain"), rtol=1e-5, atol=1e-5)
    if method in ("vera", "mtl_lora"):  # the others have their magnitudes yet
        for _, module in model.adapter_sites.holding("gated"):
            module.gate.bias.detach().fill_(-150.0)
        assert torch.equal(run(model, batch, "gated"), run(model, batch, None))
    with pytest.raises(AdapterError, match="gating"):
        model.merge_adapter("gated")


@torch.no_grad()
def test_the_norm_of_dora_has_no_gradient_and_follows_the_weight() -> None:
    model = adapted("bert")
    model.add_adapter("x", MORE_METHODS["dora"])
    disturb(model, "x")
    site, module = model.adapter_sites.holding("x")[0]
    for change in (lambda: None, lambda: site.weight.mul_(2), lambda: module.lora_A.add_(0.3)):
        change()
        wanted = torch.linalg.norm(site.weight + module.scale * module.lora_B @ module.lora_A, dim=1)
        torch.testing.assert_close(module.norms(), wanted)
        run(model, inputs("bert"), "x")
        gain, _ = module._magnitudes.get("gain", [], module.gain)
        torch.testing.assert_close(gain, module.m.weight[:, 0] / wanted)


def test_rows_of_zeros_have_a_magnitude_of_zero() -> None:
    model = adapted("bert")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[3] = 0
    model.add_adapter("x", "dora")
    assert torch.equal(run(model, inputs("bert"), "x"), run(model, inputs("bert"), None))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LoRAConfig(r=1, composition_mode="scale", init_weights="ia3", vera_d=0.1), "vera_d=0.1.*must be None"),
        (lambda: MTLLoRAConfig(vera_b=0.0), "vera_b=0.0.*must be None"),
        (lambda: MTLLoRAConfig(r=1, composition_mode="scale", init_weights="ia3"), "composition_mode='scale'.*'add'"),
        (lambda: MTLLoRAConfig(task_specific_matrix_type="full"), "task_specific_matrix_type"),
        (lambda: MTLLoRAConfig(n_up_projection=0), "n_up_projection"),
        (lambda: LoRAConfig(legacy=True), "legacy=True.*dora and vera"),
    ],
)
def test_what_does_not_go_together_is_refused(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize("kind", ["singular_values", "linear"])
def test_tasks_share_a_batch(kind: str) -> None:
    model, batch = adapted("bert"), inputs("bert")
    for name in "ab":
        model.add_adapter(name, MTLLoRAConfig(r=2, n_up_projection=2, task_specific_matrix_type=kind))
        disturb(model, name)
    alone = {name: run(model, batch, name) for name in "ab"}
    for tasks in (torch.tensor([1, 0, 0, 1]), ["b", "a", "a", "b"]):
        found = run(model, batch, MultiTask("a", "b"), task_ids=tasks)
        wanted = torch.stack([alone["ab"[task]][row] for row, task in enumerate([1, 0, 0, 1])])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_numbers_of_the_specification() -> None:
    """W = [[3, 4], [0, 5]], b = [1, 0], A = [1, 0], B = [3, 0]ᵀ, x = [1, 1]: 1.x's 9.7073 and the paper's value."""
    module = torch.nn.Linear(2, 2)
    norm = math.hypot(3 + 3, 4)
    assert 5 / norm * 14 == pytest.approx(9.7073, abs=1e-4)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
        module.bias.copy_(torch.tensor([1.0, 0.0]))
    for legacy, wanted in ((True, 9.7073), (False, 5 / math.hypot(9, 4) * 13 + 1)):
        site = adapters.sites.LinearSite(
            adapters.sites.Place(0, "", "", "", "q"), adapters.topology.Linear("", module, 2, 2)
        )
        dora = adapters.methods.dora.DoRA(LoRAConfig(r=1, alpha=2, use_dora=True, legacy=legacy), site)
        with torch.no_grad():
            dora.lora_A.copy_(torch.tensor([[1.0, 0.0]]))
            dora.lora_B.copy_(torch.tensor([[3.0], [0.0]]))
            x = torch.ones(1, 1, 2)
            found = dora(adapters.signals.LinearSignal(None, x, module(x))).output[0, 0]
        torch.testing.assert_close(found, torch.tensor([wanted, 5.0]), rtol=1e-4, atol=1e-4)


def sharing(**changes):
    """A model with two MTL-LoRAs `a` and `b`, and a LoRA."""
    model = adapted("bert", "lora")
    for name in "ab":
        model.add_adapter(name, MTLLoRAConfig(r=2, n_up_projection=2, **changes))
        disturb(model, name)
    return model


def pairs_of(model, key: str):
    """The parameter `key` of `a` and of `b` at each site."""
    both = zip(model.adapter_sites.holding("a"), model.adapter_sites.holding("b"), strict=True)
    return [(one.get_parameter(key), other.get_parameter(key)) for (_, one), (_, other) in both]


@pytest.mark.parametrize("names", [["b", "a"], "b,a", MultiTask("b", "a")])
def test_shared_parameters_are_one_until_they_are_unshared(names, tmp_path) -> None:
    model = sharing()
    wanted = [(one.clone(), other.clone()) for one, other in pairs_of(model, "lora_A")]
    model.share_parameters(names, reference_adapter_name="a")
    for key in ("lora_A", "lora_B"):
        assert all(one is other for one, other in pairs_of(model, key))
    assert all(one is not other for one, other in pairs_of(model, "weights"))
    assert all(torch.equal(one, first) for (one, _), (first, _) in zip(pairs_of(model, "lora_A"), wanted, strict=True))
    copied = copy.deepcopy(model)
    assert all(one is other for one, other in pairs_of(copied, "lora_B"))
    alone = run(model, inputs("bert"), "b")
    model.save_adapter(tmp_path, "b")
    model.load_adapter(tmp_path, load_as="again")
    assert torch.equal(run(model, inputs("bert"), "again"), alone)
    model.unshare_parameters("b,a")
    for key in ("lora_A", "lora_B"):
        for one, other in pairs_of(model, key):
            assert one is not other
            assert torch.equal(one, other)
            assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    ("names", "reference", "match"),
    [
        (["a", "c"], None, "'c'; this model has"),
        (["a", "b"], "lora", "reference 'lora' is not one of"),
        ([], None, "reference '' is not one of"),
        (["lora"], None, "'lora' is a LoRAConfig.*MTLLoRAConfig can"),
        (["a", "wide"], None, "'wide' and 'a' differ in places or sizes"),
    ],
)
def test_what_cannot_be_shared_is_refused(names, reference, match: str) -> None:
    model = sharing()
    model.add_adapter("wide", MTLLoRAConfig(r=3, n_up_projection=2))
    with pytest.raises(AdapterError, match=match):
        model.share_parameters(names, reference_adapter_name=reference)
    with pytest.raises(AdapterError, match="nothing is shared under this name"):
        model.unshare_parameters("a,b")
