"""The verbs that users call on a model with adapters."""

import pytest
import torch
from tiny_models import CONFIGS, METHODS, adapted, disturb, inputs, output, plain, run
from transformers import BertForSequenceClassification

import adapters
from adapters import AdapterSetup, Average, BatchSplit, Fuse, LoRAConfig, Parallel, PrefixTuningConfig, Stack


def with_static_head():
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIGS["bert"]).eval()
    adapters.init(model)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_init_keeps_the_class_by_name(name: str) -> None:
    model, other = plain(name), plain(name)
    assert adapters.init(model) is None
    assert adapters.init(model) is model
    assert isinstance(model, type(other))
    kind = type(model)
    assert (kind.__name__, kind.__qualname__, kind.__module__, str(kind)) == (
        type(other).__name__,
        type(other).__qualname__,
        type(other).__module__,
        str(type(other)),
    )
    adapters.init(other)
    assert type(other) is kind


def test_outer_and_base_model_are_one() -> None:
    model = with_static_head()
    assert model.adapters_config is model.base_model.adapters_config
    model.base_model.add_adapter("a")
    assert "a" in model.adapters_config
    model.set_active_adapters("a")
    assert model.base_model.active_adapters == Stack("a")
    assert model.has_adapters()
    model.delete_adapter("a")
    assert not model.base_model.has_adapters()


def test_the_ways_to_activate() -> None:
    model = adapted("bert", "seq_bn", "lora")
    model.add_adapter("p", "par_bn", set_active=True)
    assert model.active_adapters == Stack("p")
    model.active_adapters = "lora"
    assert model.active_adapters == Stack("lora")
    model.set_active_adapters(Stack("seq_bn", "lora"))
    assert model.active_adapters == Stack("seq_bn", "lora")
    with pytest.warns(FutureWarning, match="deprecated"):
        model.set_active_adapters(["seq_bn", "lora"])
    assert model.active_adapters == Stack("seq_bn", "lora")
    assert not model.has_parallel_adapters
    model.set_active_adapters(Parallel("seq_bn", "lora"))
    assert model.has_parallel_adapters
    assert model.adapters_config.active_setup == Parallel("seq_bn", "lora")
    model.set_active_adapters(None)
    assert model.active_adapters is None
    assert model.adapters_config.active_setup is None


def test_skipped_layers_have_no_adapters() -> None:
    model, batch = adapted("bert", "double_seq_bn"), inputs("bert")
    model.add_adapter("second_only", METHODS["double_seq_bn"].replace(leave_out=[0]))
    target = model.get_adapter("second_only")[1]
    for location, module in model.get_adapter("double_seq_bn")[1].items():
        target[location].load_state_dict(module.state_dict())
    model.set_active_adapters("double_seq_bn", skip_layers=[0])
    assert torch.equal(output(model, batch), run(model, batch, "second_only"))
    model.set_active_adapters("double_seq_bn", skip_layers=[0, 1])
    assert torch.equal(output(model, batch), output(plain("bert"), batch))
    model.set_active_adapters("double_seq_bn")
    assert not torch.equal(output(model, batch), run(model, batch, "second_only"))


def test_a_replaced_adapter_is_new() -> None:
    model = adapted("bert", "lora")
    model.set_active_adapters("lora")
    model.add_adapter("lora", LoRAConfig(r=2), overwrite_ok=True)
    assert list(model.adapters_config) == ["lora"]
    assert {p.shape[0] for key, p in model.named_parameters() if "lora_A" in key} == {2}
    names = list(model.state_dict())
    model.delete_adapter("lora")
    assert len(names) > len(model.state_dict()) == len(plain("bert").state_dict())


def test_deleting_deactivates_what_is_active_alone() -> None:
    model = adapted("bert", "seq_bn", "lora")
    model.set_active_adapters(Stack("seq_bn", "lora"))
    model.delete_adapter("lora")
    assert model.active_adapters == Stack("seq_bn", "lora")
    assert torch.equal(output(model, inputs("bert")), run(model, inputs("bert"), "seq_bn"))
    model.set_active_adapters("seq_bn")
    model.delete_adapter("seq_bn")
    assert model.active_adapters is None


def test_the_shape_of_get_adapter() -> None:
    model = adapted("t5", "double_seq_bn", "lora", "prefix_tuning", "gated_prefix")
    layers = model.get_adapter("double_seq_bn")
    assert {layer: set(found) for layer, found in layers.items()} == {
        0: {"mh_adapter", "output_adapter"},
        1: {"mh_adapter", "output_adapter"},
        2: {"mh_adapter", "cross_adapter", "output_adapter"},
        3: {"mh_adapter", "cross_adapter", "output_adapter"},
    }
    locations = model.get_adapter("lora")[0]
    assert set(locations) == {"selfattn_lora", "intermediate_lora", "output_lora"}
    assert isinstance(locations["selfattn_lora"], torch.nn.ModuleList)
    assert len(locations["selfattn_lora"]) == 4
    assert set(model.get_adapter("prefix_tuning")[0]["encoder_prefix"]) == {"prefix"}
    gated = model.get_adapter("gated_prefix")
    assert set(gated[0]["encoder_prefix"]) == {"prefix", "gate"}
    assert set(gated[1]["encoder_prefix"]) == {"gate"}
    assert set(gated[2]["self_prefix"]) == set(gated[2]["cross_prefix"]) == {"prefix", "gate"}
    assert model.get_adapter("none") == {}


@pytest.mark.parametrize("method", METHODS)
def test_get_adapter_has_every_parameter(method: str) -> None:
    model = adapted("bert", method)
    found = {id(p) for layer in model.get_adapter(method).values() for m in layer.values() for p in m.parameters()}
    own = {id(p) for m in model._modules_of(method) for p in m.parameters()}
    assert found == own
    added = len(list(model.parameters())) - len(list(plain("bert").parameters()))
    assert added == len(own)


def test_adapter_to() -> None:
    model = adapted("bert", "lora", "unipelt")
    model.adapter_to("unipelt", dtype=torch.float64)
    dtypes = {name: {p.dtype for m in model._modules_of(name) for p in m.parameters()} for name in ("lora", "unipelt")}
    assert dtypes == {"lora": {torch.float32}, "unipelt": {torch.float64}}
    model.adapter_to("none", device="cpu")
    model = adapted("bert", "seq_bn", "par_bn")
    model.add_adapter_fusion("seq_bn,par_bn")
    model.adapter_fusion_to(["seq_bn", "par_bn"], dtype=torch.float64)
    assert {p.dtype for key, p in model.named_parameters() if "fusion" in key} == {torch.float64}


def test_summaries() -> None:
    model = with_static_head()
    model.add_adapter("a", METHODS["seq_bn"])
    model.add_adapter("b", LoRAConfig(r=4))
    model.train_adapter("b")
    full = sum(p.numel() for p in plain("bert").parameters())
    bottleneck, lora = 2 * (16 * 4 + 4 + 4 * 16 + 16), 2 * 2 * (16 * 4 * 2)
    rows = model.adapter_summary(as_dict=True)
    assert rows == [
        {
            "name": "a",
            "architecture": "bottleneck",
            "active": False,
            "#param": bottleneck,
            "train": False,
            "%param": pytest.approx(bottleneck / full * 100),
        },
        {
            "name": "b",
            "architecture": "lora",
            "active": True,
            "#param": lora,
            "train": True,
            "%param": pytest.approx(lora / full * 100),
        },
        {"name": "Full model", "#param": full, "%param": 100.0, "train": False},
    ]
    lines = model.adapter_summary().split("\n")
    assert [lines[index] for index in (0, 2, 5, 7)] == ["=" * 80, "-" * 80, "-" * 80, "=" * 80]
    assert lines[1].split() == ["Name", "Architecture", "#Param", "%Param", "Active", "Train"]
    assert lines[3] == f"{'a':<25}{'bottleneck':<15}{bottleneck:>12,}{bottleneck / full * 100:>12.3f}{0:>8}{0:>8}"
    assert lines[6] == f"{'Full model':<25}{'':<15}{full:>12,}{100.0:>12.3f}{'':>8}{0:>8}"
    assert all(len(line) == 80 for line in lines)


def test_freezing() -> None:
    model = with_static_head()
    assert not model.model_frozen
    model.freeze_model()
    assert model.model_frozen and model.base_model.model_frozen
    assert not any(p.requires_grad for p in model.base_model.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())
    model.freeze_model(False)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.model_frozen


def test_training_an_adapter_leaves_the_head_trainable() -> None:
    model = with_static_head()
    model.add_adapter("a", METHODS["lora"])
    model.add_adapter("b", METHODS["unipelt"])
    model.train_adapter("b")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    own = {id(p) for m in model._modules_of("b") for p in m.parameters()}
    heads = {key for key in trained if key.startswith("classifier.")}
    assert heads == {"classifier.weight", "classifier.bias"}
    assert {key for key, p in model.named_parameters() if id(p) in own} == trained - heads
    assert model.active_adapters == Stack("b")
    model.train_adapter("a", train_embeddings=True)
    assert model.get_input_embeddings().weight.requires_grad
    for setup in (
        Stack("a", "b"),
        Average("a", "b"),
        BatchSplit("a", Stack("a", "b"), batch_sizes=1),
        Parallel("a", None),
    ):
        model.train_adapter(setup)
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert any(".a." in key for key in trained)
        assert any(".b." in key for key in trained) == ("b" in setup.flatten())


def test_gates_are_reported() -> None:
    model, batch = adapted("bert", "unipelt", "lora"), inputs("bert")
    model.set_active_adapters("unipelt")
    with torch.no_grad():
        scores = model(**batch, output_adapter_gating_scores=True)["adapter_gating_scores"]
        plain_tuple = model(**batch, output_adapter_gating_scores=True, return_dict=False)
        without = model(**batch)
    assert "adapter_gating_scores" not in without
    assert set(scores) == {"unipelt"}
    assert set(scores["unipelt"]) == {0, 1}
    shapes = {location: values.shape for location, values in scores["unipelt"][0].items()}
    assert shapes == {"selfattn_lora": (4, 2), "self_prefix": (4,), "output_adapter": (4,)}
    assert all(((v > 0) & (v < 1)).all() for layer in scores["unipelt"].values() for v in layer.values())
    assert plain_tuple[-1].keys() == scores.keys()
    split = BatchSplit("unipelt", "lora", batch_sizes=[1, 3])
    with AdapterSetup(split), torch.no_grad():
        scores = model(**batch, output_adapter_gating_scores=True)["adapter_gating_scores"]
    assert scores["unipelt"][0]["self_prefix"].shape == (1,)


def test_fusion_attentions_are_reported() -> None:
    model, batch = adapted("bert", "seq_bn", "par_bn"), inputs("bert")
    model.add_adapter_fusion("seq_bn,par_bn", set_active=True)
    with torch.no_grad():
        found = model(**batch, output_adapter_fusion_attentions=True)["adapter_fusion_attentions"]
    assert set(found) == {"seq_bn,par_bn"}
    weights = found["seq_bn,par_bn"][0]["output_adapter"]
    assert weights.shape == (4, 6, 2)
    torch.testing.assert_close(torch.tensor(weights.sum(-1)), torch.ones(4, 6))


def test_contexts_nest() -> None:
    model, batch = adapted("bert", "lora", "seq_bn"), inputs("bert")
    model.set_active_adapters("lora")
    lora, seq_bn, base = output(model, batch), run(model, batch, "seq_bn"), run(model, batch, None)
    with AdapterSetup("seq_bn") as outer:
        assert AdapterSetup.get_context() is outer
        assert model.effective_setup() == Stack("seq_bn")
        with AdapterSetup(None):
            assert torch.equal(output(model, batch), base)
            with AdapterSetup("lora"):
                assert torch.equal(output(model, batch), lora)
                assert len(AdapterSetup.get_contexts()) == 3
            assert torch.equal(output(model, batch), base)
        with AdapterSetup(None, ignore_empty=True):
            assert torch.equal(output(model, batch), seq_bn)
        assert torch.equal(output(model, batch), seq_bn)
    assert torch.equal(output(model, batch), lora)
    with pytest.raises(RuntimeError, match="leaves"), AdapterSetup("seq_bn"):
        raise RuntimeError("leaves")
    assert AdapterSetup.get_context() is None
    assert AdapterSetup(Parallel("lora", Stack("lora", "seq_bn"))).head_setup == ["lora", "seq_bn"]
    setup = AdapterSetup("seq_bn")
    with setup, setup:
        assert torch.equal(output(model, batch), seq_bn)
    assert torch.equal(output(model, batch), lora)


def test_the_forward_signature_has_our_arguments() -> None:
    import inspect

    parameters = inspect.signature(with_static_head().forward).parameters
    assert "labels" in parameters
    assert set(adapters.wrap.CONTEXT_ARGUMENTS) <= set(parameters)


def test_labels_are_repeated_for_parallel() -> None:
    model, batch = with_static_head(), inputs("bert")
    labels = torch.tensor([0, 1, 1, 0])
    for name in ("a", "b"):
        model.add_adapter(name, METHODS["lora"])
        disturb(model, name)
    with torch.no_grad():
        alone = [model(**batch, labels=labels) for model.active_adapters in ("a", "b")]
        model.set_active_adapters(Parallel("a", "b"))
        both = model(**batch, labels=labels)
        given = model(**{k: v.repeat(2, 1) for k, v in batch.items()}, adapter_input_parallelized=True)
    torch.testing.assert_close(both.logits, torch.cat([one.logits for one in alone]))
    torch.testing.assert_close(both.loss, (alone[0].loss + alone[1].loss) / 2)
    torch.testing.assert_close(given.logits, both.logits)


def test_fusions_are_found_by_name() -> None:
    model = adapted("bert", "seq_bn", "par_bn")
    model.add_adapter_fusion(Fuse("seq_bn", "par_bn", name="f"), "static", set_active=True)
    assert model.active_adapters == Fuse("seq_bn", "par_bn", name="f")
    assert list(model.adapters_config.fusions) == ["f"]
    config, members = model.adapters_config.get_fusion("f")
    assert (config.value, members) == (False, ["seq_bn", "par_bn"])
    model.add_adapter_fusion(["seq_bn", "par_bn"], "static", name="f", overwrite_ok=True)
    assert model.get_fusion_regularization_loss() is None
    model.delete_adapter_fusion(Fuse("seq_bn", "par_bn", name="f"))
    assert not model.adapters_config.fusions


def test_a_prefix_of_another_length() -> None:
    model, batch = adapted("llama"), inputs("llama")
    model.add_adapter("a", PrefixTuningConfig(prefix_length=1, bottleneck_size=2), set_active=True)
    assert output(model, batch).shape == output(plain("llama"), batch).shape
