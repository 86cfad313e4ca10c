"""AdapterDrop: layers without adapters, for some passes (`skip_layers`) or for good (`leave_out`), in every block."""

import functools

import pytest
import torch
from tiny_models import CONFIGS, METHODS, adapted, changed, disturb, inputs, output, positions, rows_of, run

from adapters import AdapterSetup, Average, BatchSplit, Fuse, MultiTask, Parallel, Route, RouterConfig, Split, Stack

TASKS = {"task_ids": torch.tensor([0, 1, 1, 0])}


@functools.cache
def model_of(name: str, method: str):
    """`a` and `b`, and `a_late` and `b_late`, which are the same but for layer 0."""
    model = adapted(name)
    for adapter in "ab":
        model.add_adapter(adapter, METHODS[method])
        disturb(model, adapter)
        late = f"{adapter}_late"
        model.add_adapter(late, changed(METHODS[method], leave_out=[0]))
        for site, module in model.adapter_sites.holding(late):
            module.load_state_dict(site.adapters[adapter].state_dict())
    for gate, experts in {"gate": ["a", "b"], "gate_late": ["a_late", "b_late"]}.items():
        model.add_adapter(gate, RouterConfig(experts=experts))
    if method == "seq_bn":
        for fuse in (Fuse("a", "b"), Fuse("a_late", "b_late")):
            torch.manual_seed(0)
            model.add_adapter_fusion(fuse, "static")
        for site in model.adapter_sites.fusion_sites("a_late,b_late"):
            site.fusions["a_late,b_late"].load_state_dict(site.fusions["a,b"].state_dict())
    return model.eval()


def blocks(name: str, a: str, b: str, gate: str) -> dict:
    length = positions(name)
    return {
        "name": (a, {}),
        "stack": (Stack(a, b), {}),
        "average": (Average(a, b), {}),
        "split": (Split(a, b, splits=[2, length - 2]), {}),
        "batch_split": (BatchSplit(a, b, batch_sizes=[1, 3]), {}),
        "parallel": (Parallel(a, b), {}),
        "multitask": (MultiTask(a, b), TASKS),
        "rows": (None, {"adapter_names": [a, None, b, Stack(a, b)]}),
        "route": (Route(a, b, gate=gate), {}),
        "fuse": (Fuse(a, b), {}),
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("method", ["lora", "seq_bn"])
def test_a_skipped_layer_is_one_without_adapters(name: str, method: str) -> None:
    model, batch = model_of(name, method), inputs(name)
    skipped = blocks(name, "a", "b", "gate")
    late = blocks(name, "a_late", "b_late", "gate_late")
    for kind in skipped:
        if kind == "fuse" and method == "lora":
            continue
        setup, more = skipped[kind]
        model.set_active_adapters(setup if setup is not None else "a", skip_layers=[0])
        found = output(model, batch, **more)
        model.set_active_adapters(None)
        expected = run(model, batch, late[kind][0], **late[kind][1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=lambda text, kind=kind: f"{kind}: {text}")
        assert (found[:4] - run(model, batch, setup, **more)[:4]).abs().max() > 1e-4, kind


def test_all_layers_skipped_is_the_plain_model() -> None:
    model, batch = model_of("bert", "lora"), inputs("bert")
    model.set_active_adapters("a", skip_layers=[0, 1])
    skipped = output(model, batch)
    model.set_active_adapters("a")  # which skips none again
    assert model.adapters_config.skip_layers is None
    whole = output(model, batch)
    model.set_active_adapters(None)
    assert torch.equal(skipped, run(model, batch, None))
    assert torch.equal(whole, run(model, batch, "a"))


def gradients(model, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for out in outputs:
        out.pow(3).sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "albert"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not_reentrant"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
def test_shared_lower_layers_change_no_gradient(name: str, checkpointing: bool | None) -> None:
    """The channels of Parallel go through layer 0 once, in training too."""
    model, batch = adapted(name), inputs(name)
    children = {}
    for adapter, method in {"a": "lora", "b": "seq_bn", "c": "prefix_tuning"}.items():
        model.add_adapter(adapter, changed(METHODS[method], leave_out=[0]))
        disturb(model, adapter)
        children[adapter] = None
    setup = Parallel(*children)
    model.train_adapter(setup)
    model.eval()
    if name in ("gpt2", "llama", "mistral", "t5", "bart"):
        batch = {**batch, "use_cache": False}

    def under(setup) -> torch.Tensor:
        with AdapterSetup(setup):
            return model(**batch)[0]

    expected = gradients(model, [under(child) for child in children])
    if checkpointing is not None:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        torch.manual_seed(0)
        expected = gradients(model, [under(setup)])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        torch.manual_seed(0)
    found = gradients(model, [under(setup)])
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * scale, msg=key)


def test_skipped_layers_get_no_gradient() -> None:
    model, batch = adapted("bert", "lora", "seq_bn"), inputs("bert")
    setup = Parallel("lora", "seq_bn")
    model.train_adapter(setup)
    model.set_active_adapters(setup, skip_layers=[0])
    model(**batch)[0].sum().backward()
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    assert reached == {key for key in trained if ".layer.1." in key}
    model.zero_grad()
    model(**rows_of(batch, [0]), adapter_names=["lora"])[0].sum().backward()
    assert not any(".layer.0." in key for key, p in model.named_parameters() if p.grad is not None)


def test_only_a_setup_that_needs_it_hooks_the_blocks() -> None:
    model, batch = model_of("bert", "lora"), inputs("bert")
    model.adapter_sites._refresh()
    block = model.encoder.layer[0]

    def hooks() -> int:
        return len(block._forward_hooks) + len(block._forward_pre_hooks)

    before = hooks()
    for setup in (Parallel("a", "b"), BatchSplit("a_late", "b_late", batch_sizes=2)):
        run(model, batch, setup)
        assert hooks() == before
    run(model, batch, Parallel("a_late", "b_late"))
    assert hooks() > before
