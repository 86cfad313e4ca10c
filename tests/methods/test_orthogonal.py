"""OFT, BOFT, HRA, RoAd and MiSS: against PEFT with the same parameters, against the formula, and what they refuse."""

import peft
import pytest
import torch
from tiny_models import adapted, disturb, inputs, output, plain, run

import adapters
from adapters import AdapterError, Average, BatchSplit, ConfigError, Split, Stack

PLACES = {"attn_matrices": ["q", "v", "o"], "intermediate_lora": True, "output_lora": True}
TARGETS = r".*layer.*(query|value|dense)"
CASES = {
    "oft": (("oft", {"block_size": 4}), ("OFT", {"oft_block_size": 4})),
    "oft_8_terms": (
        ("oft", {"block_size": 8, "num_cayley_neumann_terms": 8}),
        ("OFT", {"oft_block_size": 8, "num_cayley_neumann_terms": 8}),
    ),
    "oft_cayley": (
        ("oft", {"block_size": 8, "use_cayley_neumann": False}),
        ("OFT", {"oft_block_size": 8, "use_cayley_neumann": False}),
    ),
    "oft_blocks": (("oft", {"block_size": 0, "block_num": 2}), ("OFT", {"oft_block_size": 0, "r": 2})),
    "oft_share": (("oft", {"block_size": 4, "block_share": True}), ("OFT", {"oft_block_size": 4, "block_share": True})),
    "coft": (
        ("oft", {"block_size": 4, "coft": True, "eps": 0.3}),
        ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    ),
    "boft": (("boft", {"block_size": 4}), ("BOFT", {"boft_block_size": 4})),
    "boft_blocks": (
        ("boft", {"block_size": 0, "block_num": 2}),
        ("BOFT", {"boft_block_size": 0, "boft_block_num": 2}),
    ),
    "boft_factors": (
        ("boft", {"block_size": 2, "n_butterfly_factor": 3}),
        ("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    ),
    "hra": (("hra", {"r": 4}), ("HRA", {"r": 4})),
    "hra_odd": (("hra", {"r": 5}), ("HRA", {"r": 5})),
    "hra_gram_schmidt": (("hra", {"r": 4, "apply_GS": True}), ("HRA", {"r": 4, "apply_GS": True})),
    "road_1": (("road", {"group_size": 8}), ("Road", {"group_size": 8})),
    "road_2": (("road", {"group_size": 4, "variant": "road_2"}), ("Road", {"group_size": 4, "variant": "road_2"})),
    "road_4": (("road", {"group_size": 4, "variant": "road_4"}), ("Road", {"group_size": 4, "variant": "road_4"})),
    "miss": (("miss", {"r": 4}), ("Miss", {"r": 4})),
    "miss_padded": (("miss", {"r": 5}), ("Miss", {"r": 5})),
    "miss_mini": (
        ("miss", {"r": 4, "variant": "mini", "mini_r": 2}),
        ("Miss", {"r": 4, "init_weights": "mini", "mini_r": 2}),
    ),
    "miss_bat": (("miss", {"r": 4, "variant": "bat"}), ("Miss", {"r": 4, "init_weights": "bat"})),
}


@pytest.fixture
def butterflies(monkeypatch):
    """PEFT ignores the number of factors without its CUDA extension, of which this is a substitute."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", BlockDiagonal)


def held_by_peft(layer, key: str) -> torch.nn.Parameter:
    """The parameter of PEFT's layer that has the name `key` here."""
    held = getattr(layer, key)["default"]
    return held if isinstance(held, torch.nn.Parameter) else held.weight


def both(case: str):
    """A model with our adapter, and PEFT's with the same parameters."""
    (ours, fields), (theirs, peft_fields) = CASES[case]
    model = adapted("bert")
    model.add_adapter("x", adapters.AdapterConfig.load(ours, **fields, **PLACES), set_active=True)
    disturb(model, "x")
    config = getattr(peft, f"{theirs}Config")(target_modules=TARGETS, **peft_fields)
    other = peft.get_peft_model(plain("bert"), config).eval()
    for site, module in model.adapter_sites.holding("x"):
        layer = other.base_model.model.get_submodule(site.host_path)
        for key, parameter in module.named_parameters():
            with torch.no_grad():
                held_by_peft(layer, key).copy_(parameter)
    return model, other


@pytest.mark.filterwarnings("ignore:.*symmetric initialization", "ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case, butterflies):
    model, other = both(case)
    batch = inputs("bert")
    torch.testing.assert_close(output(model, batch), other(**batch)[0].detach(), rtol=1e-5, atol=1e-5)
    model.train_adapter("x")
    model.eval()
    weights = torch.randn(model(**batch)[0].shape, generator=torch.Generator().manual_seed(0))
    for one in (model, other):
        (one(**batch)[0] * weights).sum().backward()
    for site, module in model.adapter_sites.holding("x"):
        layer = other.base_model.model.get_submodule(site.host_path)
        for key, parameter in module.named_parameters():
            grad = held_by_peft(layer, key).grad
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5 * max(grad.abs().max().item(), 1))


def matrix(site, change) -> torch.Tensor:
    """The matrix of a linear function of rows of the site's width."""
    return change(torch.eye(site.inputs)).T


ROTATIONS = {
    "oft": adapters.OFTConfig(block_size=4, use_cayley_neumann=False, attn_matrices=["q"]),
    "boft": adapters.BOFTConfig(block_size=2, n_butterfly_factor=4, attn_matrices=["q"]),
}


@torch.no_grad()
@pytest.mark.parametrize("method", ROTATIONS)
def test_rotations_are_orthogonal(method):
    model = adapted("bert")
    model.add_adapter("x", ROTATIONS[method])
    disturb(model, "x", 1.0)
    for site, module in model.adapter_sites.holding("x"):
        rotation = matrix(site, module.transform_input)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(site.inputs), rtol=0, atol=1e-5)
        if method == "boft":  # four factors of 2 x 2 blocks mix all of 16 inputs
            assert (rotation.abs() > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 5, 6])
def test_hra_is_the_product_of_its_reflections(rank):
    model = adapted("bert")
    model.add_adapter("x", adapters.HRAConfig(r=rank, attn_matrices=["q"]))
    disturb(model, "x", 1.0)
    for site, module in model.adapter_sites.holding("x"):
        weight = site.weight.double()
        for direction in module.hra_u.double().T:
            unit = direction / direction.norm()
            weight = weight - 2 * torch.outer(weight @ unit, unit)
        torch.testing.assert_close(module.merged_weight(site.weight.double()), weight, rtol=1e-5, atol=1e-6)


INPUT_METHODS = {"oft": adapters.OFTConfig(block_size=4), "boft": adapters.BOFTConfig(block_size=4)}


@pytest.mark.parametrize("method", INPUT_METHODS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_alone_the_map_is_computed_once(name, method, monkeypatch):
    model, batch = adapted(name), inputs(name)
    model.add_adapter("x", INPUT_METHODS[method])
    disturb(model, "x")
    calls = []
    site_class = type(model.adapter_sites.holding("x")[0][0])
    true_map = site_class.map
    monkeypatch.setattr(site_class, "map", lambda site, x: calls.append(site) or true_map(site, x))
    run(model, batch, "x")
    assert calls == []
    run(model, batch, BatchSplit("x", None, batch_sizes=[2, 2]))
    assert calls


@pytest.mark.parametrize("method", INPUT_METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_alone_it_is_what_it_is_in_a_block(name, method):
    """What the map's input is changed to in the one case is a change added to its output in the other."""
    model, batch = adapted(name, "lora"), inputs(name)
    model.add_adapter("x", INPUT_METHODS[method])
    disturb(model, "x")
    model.add_adapter("y", adapters.LoRAConfig(r=1))  # the identity, at its start
    alone = run(model, batch, "x")
    length = alone.shape[1]
    for setup in (
        Stack("x", "y"),
        Average("x", "x", weights=[0.5, 0.5]),
        BatchSplit("x", "x", batch_sizes=[1, 3]),
        Split("x", "x", splits=[2, length - 2]),
    ):
        torch.testing.assert_close(run(model, batch, setup), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_stack_adds_the_changes_of_one_input():
    """Stack(oft, lora) is W R x + b + B A x."""
    model = adapted("bert", "lora")
    model.add_adapter("x", INPUT_METHODS["oft"])
    disturb(model, "x")
    site, rotation = model.adapter_sites.holding("x")[0]
    down = site.adapters["lora"]
    x = torch.randn(2, 3, site.inputs)
    with adapters.AdapterSetup(Stack("x", "lora")):
        found = site.host(x)
    expected = rotation.transform_input(x) @ site.weight.T + site.bias
    expected = expected + (x @ down.lora_A.T @ down.lora_B.T) * down.scale
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_coft_keeps_its_bound():
    model = adapted("bert")
    model.add_adapter("x", adapters.OFTConfig(block_size=4, coft=True, eps=0.01))
    disturb(model, "x")
    modules = list(model._modules_of("x"))
    start = [module.oft_R.detach().clone() for module in modules]
    output(model, inputs("bert"))
    assert all(torch.equal(module.oft_R, one) for module, one in zip(modules, start, strict=True))
    model.train_adapter("x")
    model(**inputs("bert"))[0].sum().backward()
    for module in modules:
        norms = module.oft_R.norm(dim=1) * 2**0.5
        assert (norms <= 0.01 / len(module.oft_R) ** 0.5 * (1 + 1e-5)).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        adapters.OFTConfig(block_size=4, dropout=0.5),
        adapters.OFTConfig(block_size=4, dropout=0.5, block_share=True),
        adapters.BOFTConfig(block_size=4, dropout=0.5),
    ],
    ids=["oft", "oft_share", "boft"],
)
def test_dropout_leaves_whole_blocks_alone(config):
    model = adapted("bert")
    model.add_adapter("x", config)
    disturb(model, "x")
    module = next(iter(model._modules_of("x")))
    x = torch.randn(3, 16)
    torch.manual_seed(0)
    whole, parts = module.eval().transform_input(x), module.train().transform_input(x)
    left = [torch.allclose(part, given) for part, given in zip(parts.split(4, 1), x.split(4, 1), strict=True)]
    kept = [torch.allclose(part, turned) for part, turned in zip(parts.split(4, 1), whole.split(4, 1), strict=True)]
    assert [a != b for a, b in zip(left, kept, strict=True)] == [True] * 4
    assert 0 < sum(left) < 4


@pytest.mark.parametrize("method", ["oft", "boft", "hra", "road", "miss"])
def test_init_weights_is_the_choice_between_identity_and_chance(method):
    fields = {"oft": {"block_size": 4}, "road": {"group_size": 4}, "miss": {"r": 4}}.get(method, {})
    model, batch = adapted("bert"), inputs("bert")
    for name, start in (("same", True), ("other", False)):
        model.add_adapter(name, adapters.AdapterConfig.load(method, init_weights=start, **fields))
    assert torch.equal(run(model, batch, "same"), output(model, batch))
    assert (run(model, batch, "other") - output(model, batch)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: adapters.OFTConfig(block_num=2), r"block_num=2\): 2 is in conflict with block_size=32"),
        (lambda: adapters.BOFTConfig(block_size=0), "one of the two must be 0"),
        (lambda: adapters.OFTConfig(eps=0), r"it must be a number > 0"),
        (lambda: adapters.OFTConfig(num_cayley_neumann_terms=0), "it must be an integer >= 1"),
        (lambda: adapters.HRAConfig(r=0), "it must be an integer >= 1"),
        (lambda: adapters.RoAdConfig(group_size=3), "3 is odd"),
        (lambda: adapters.RoAdConfig(variant="road_3"), "it must be one of"),
        (lambda: adapters.MiSSConfig(mini_r=2), "without effect for variant='miss'"),
        (lambda: adapters.MiSSConfig(variant="bone"), "it must be one of"),
    ],
)
def test_impossible_configurations_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (adapters.OFTConfig(), r"block_size=32\)\): the map at .*query has 16 inputs"),
        (adapters.OFTConfig(block_size=0, block_num=5), r"block_num=5\)\).*choose a divisor of 16"),
        (adapters.BOFTConfig(block_size=4, n_butterfly_factor=4), r"16 inputs of .* are 4 blocks of 4"),
        (adapters.RoAdConfig(), "16 outputs, which is no multiple of it"),
        (adapters.MiSSConfig(), "r must be at most the inputs"),
        (adapters.MiSSConfig(r=5, variant="bat"), r"r divide both \(bat\)"),
        (adapters.MiSSConfig(r=4, variant="mini", mini_r=3), r"mini_r divide the outputs \(mini\)"),
    ],
)
def test_widths_that_do_not_fit_are_refused(config, message):
    model = adapted("bert")
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=message):
        model.add_adapter("x", config)
    assert list(model.state_dict()) == before
