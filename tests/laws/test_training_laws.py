"""What trains, gradient checkpointing, threads."""

import threading

import pytest
import torch
from tiny_models import CONFIGS, METHODS, TEXT_MODELS, adapted, inputs, output, run

import adapters
from adapters import AdapterSetup, Average, BatchSplit, Fuse, Parallel, Stack

each_model = pytest.mark.parametrize("name", CONFIGS)
each_method = pytest.mark.parametrize("method", METHODS)


def parameters_of(model, *names: str) -> dict[int, torch.nn.Parameter]:
    return {id(p): p for name in names for module in model._modules_of(name) for p in module.parameters()}


def loss_of(model, batch) -> torch.Tensor:
    """A loss that looks at every position in another way, so that no norm hides a gradient."""
    torch.manual_seed(3)
    hidden = model(**batch)[0]
    return (hidden * torch.randn(hidden.shape)).sum()


@each_model
@each_method
def test_gradients_reach_the_adapter_and_nothing_else(name: str, method: str) -> None:
    model, batch = adapted(name, method), inputs(name)
    model.add_adapter("other", "lora")
    model.train_adapter(method)
    assert model.training
    own = parameters_of(model, method)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(own)
    loss_of(model, batch).backward()
    names = {id(p): key for key, p in model.named_parameters()}
    still = {names[key] for key, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not still
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def gradients(model, batch, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    own = parameters_of(model, *names)
    return {key: p.grad.clone() for key, p in model.named_parameters() if id(p) in own and p.grad is not None}


SETUPS = {
    "bottleneck": "double_seq_bn",
    "lora": "lora",
    "prefix": "prefix_tuning",
    "unipelt": "unipelt",
    "nested": BatchSplit(Stack("double_seq_bn", "lora"), Average("prefix_tuning", "lora"), None, batch_sizes=[1, 2, 1]),
    "parallel": Parallel("unipelt", "double_seq_bn"),
}
TRAINED = ("double_seq_bn", "lora", "prefix_tuning", "unipelt")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "albert"])  # it does not support it
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
def test_checkpointing_changes_no_gradient(name: str, setup, reentrant: bool) -> None:
    model, batch = adapted(name, *TRAINED), inputs(name)
    model.train_adapter(setup)
    expected = gradients(model, batch, TRAINED)
    assert expected
    model.set_active_adapters(None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.set_active_adapters(setup)
    found = gradients(model, batch, TRAINED)
    model.set_active_adapters("lora")
    with AdapterSetup(setup):
        model.zero_grad()
        loss = loss_of(model, batch)
    loss.backward()  # outside of the context, as a trainer does
    own = parameters_of(model, *TRAINED)
    later = {key: p.grad for key, p in model.named_parameters() if id(p) in own and p.grad is not None}
    assert found.keys() == expected.keys() == later.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=key)
        torch.testing.assert_close(later[key], gradient, rtol=1e-3, atol=1e-5, msg=key)
    model.gradient_checkpointing_disable()
    model.set_active_adapters(setup)
    for key, gradient in gradients(model, batch, TRAINED).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5, msg=key)


@each_model
def test_a_fusion_trains_alone(name: str) -> None:
    model, batch = adapted(name, "seq_bn", "par_bn"), inputs(name)
    fuse = Fuse("seq_bn", "par_bn")
    model.add_adapter_fusion(fuse, "dynamic")
    model.train_adapter_fusion(fuse)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".adapter_fusion_layer.seq_bn,par_bn." in key for key in trained)
    (loss_of(model, batch) + model.get_fusion_regularization_loss()).backward()
    gradient = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(value is not None for value in gradient.values())
    assert all(value.abs().sum() > 0 for key, value in gradient.items() if not key.endswith("key.bias"))
    model.train_adapter_fusion(fuse, unfreeze_adapters=True)
    assert all(p.requires_grad for p in parameters_of(model, "seq_bn", "par_bn").values())


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method: str) -> None:
    model, batch = adapted("bert", method), inputs("bert")
    model.train_adapter(method)
    model.eval()
    target = run(model, batch, None).roll(1, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(8):
        loss = (model(**batch)[0] - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)


def test_two_runs_from_one_seed_are_equal() -> None:
    found = []
    for _ in range(2):
        model = adapted("bert")
        torch.manual_seed(5)
        model.add_adapter("a", METHODS["unipelt"])
        model.train_adapter("a")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs("bert")).backward()
            optimizer.step()
        found.append(output(model.eval(), inputs("bert")))
    assert torch.equal(*found)


def in_threads(*tasks) -> list:
    """The results of tasks that run at once, in order."""
    results: list = [None] * len(tasks)

    def work(index: int) -> None:
        results[index] = tasks[index]()

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(tasks))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


@pytest.mark.parametrize("name", ("bert", "gpt2", "t5", "vit"))
def test_one_model_in_threads_with_other_setups(name: str) -> None:
    model, batch = adapted(name, *TRAINED, "adapter_plus"), inputs(name)
    model.set_active_adapters("lora")
    setups = ["double_seq_bn", "adapter_plus", "unipelt", None, Average("lora", "prefix_tuning")]
    expected = [run(model, batch, setup) for setup in setups]

    def often(setup):
        return lambda: [run(model, batch, setup) for _ in range(8)]

    for outputs, wanted in zip(in_threads(*map(often, setups)), expected, strict=True):
        assert all(torch.equal(found, wanted) for found in outputs)
    assert AdapterSetup.get_contexts() == []


@pytest.mark.parametrize("name", TEXT_MODELS[:1])
def test_two_models_in_two_threads(name: str) -> None:
    models = [adapted(name, method) for method in ("lora", "adapter_plus")]
    batch = inputs(name)
    for model, method in zip(models, ("lora", "adapter_plus"), strict=True):
        model.set_active_adapters(method)
    expected = [output(model, batch) for model in models]
    outputs = in_threads(*(lambda model=model: [output(model, batch) for _ in range(10)] for model in models))
    for found, wanted in zip(outputs, expected, strict=True):
        assert all(torch.equal(one, wanted) for one in found)


def test_a_model_within_a_model_keeps_its_own_setup() -> None:
    """A hook that runs another model in the middle of a pass disturbs neither."""
    outer, inner, batch = adapted("bert", "lora"), adapted("bert", "double_seq_bn"), inputs("bert")
    outer.set_active_adapters("lora")
    inner.set_active_adapters("double_seq_bn")
    expected, wanted, seen = output(outer, batch), output(inner, batch), []
    outer.encoder.layer[0].register_forward_hook(lambda *_: seen.append(output(inner, batch)))
    assert torch.equal(output(outer, batch), expected)
    assert torch.equal(seen[0], wanted)
    assert adapters.AdapterSetup.get_context() is None
