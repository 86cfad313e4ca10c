"""What a model says of bad input; and a call that fails changes nothing."""

import pytest
import torch
from tiny_models import METHODS, TEXT, adapted, inputs, output, plain, run
from transformers import AutoModel, LongformerConfig

import adapters
from adapters import (
    AdapterError,
    AdapterSetup,
    Average,
    BatchSplit,
    BnConfig,
    CompositionError,
    ConfigError,
    ConfigUnion,
    Fuse,
    LoRAConfig,
    MultiTask,
    Parallel,
    Split,
    Stack,
    UnknownAdapterError,
)


def state(model) -> tuple:
    """All that a failed call must leave alone."""
    hooks = [(path, len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()]
    grads = [(key, p.requires_grad) for key, p in model.named_parameters()]
    return (
        model.adapters_config.to_dict(),
        hooks,
        grads,
        model.active_adapters,
        list(model.state_dict()),
        model.training,
    )


@pytest.fixture(scope="module")
def model():
    """An adapter a (seq_bn), b (lora), c (double_seq_bn), and a fusion of a and d (seq_bn). No test changes it."""
    model = adapted("bert")
    for name, method in {"a": "seq_bn", "b": "lora", "c": "double_seq_bn", "d": "seq_bn"}.items():
        model.add_adapter(name, METHODS[method])
    model.add_adapter_fusion("a,d")
    model.set_active_adapters("b")
    return model


ONLY_CROSS = BnConfig(
    mh_adapter=False, output_adapter=False, cross_adapter=True, reduction_factor=2, non_linearity="relu"
)
NOWHERE = LoRAConfig(leave_out=[0, 1])
TWICE = ConfigUnion(LoRAConfig(leave_out=[0]), LoRAConfig())
REFUSED = {
    "name twice": (lambda m: m.add_adapter("a"), AdapterError, r"'a' has already been added; pass overwrite_ok=True"),
    "no such layer": (
        lambda m: m.add_adapter("x", LoRAConfig(leave_out=[2])),
        AdapterError,
        r"LoRAConfig\(leave_out=\[2\]\)\): BertModel has no layer 2; its layers are 0 to 1",
    ),
    "no such layer to skip": (
        lambda m: m.set_active_adapters("a", skip_layers=[1, 9]),
        AdapterError,
        r"skip_layers=\[1, 9\]\): BertModel has no layer 9; its layers are 0 to 1",
    ),
    "enable": (lambda m: m.enable_adapters(), AdapterError, r"call set_active_adapters with one of"),
    "no folder": (lambda m: m.save_adapter("", "a"), AdapterError, r"saving to '': an empty path"),
    "dots": (lambda m: m.add_adapter("x.y"), AdapterError, r"'x\.y'"),
    "no name": (lambda m: m.add_adapter(""), AdapterError, "name"),
    "unknown config": (lambda m: m.add_adapter("x", "lorra"), ValueError, r"'lorra'.*did you mean 'lora'"),
    "unknown field": (lambda m: m.add_adapter("x", "lora[rr=4]"), ConfigError, r"'rr'.*did you mean 'r'"),
    "bad value": (lambda m: m.add_adapter("x", "lora[r=0]"), ConfigError, r"\br\b.*0"),
    "no cross-attention": (lambda m: m.add_adapter("x", ONLY_CROSS), AdapterError, r"no place for it in BertModel"),
    "left out everywhere": (lambda m: m.add_adapter("x", NOWHERE), AdapterError, r"no place.*leave_out"),
    "replaced by nothing": (lambda m: m.add_adapter("a", NOWHERE, overwrite_ok=True), AdapterError, "no place"),
    "union in conflict": (lambda m: m.add_adapter("x", TWICE), AdapterError, "Multiple adapter definitions conflict"),
    "unknown adapter": (
        lambda m: m.set_active_adapters("zz"),
        UnknownAdapterError,
        r"'zz'.*it has 'a', 'b', 'c' and 'd'",
    ),
    "unknown in a block": (lambda m: m.set_active_adapters(Stack("a", "zz")), UnknownAdapterError, "'zz'"),
    "unknown to train": (lambda m: m.train_adapter("zz"), UnknownAdapterError, "'zz'"),
    "unknown to fuse": (lambda m: m.add_adapter_fusion(["a", "zz"]), UnknownAdapterError, "'zz'"),
    "fusion twice": (
        lambda m: m.add_adapter_fusion("a,d"),
        AdapterError,
        r"'a,d' has already been added; pass overwrite",
    ),
    "fusion of other places": (
        lambda m: m.add_adapter_fusion(["a", "c"]),
        CompositionError,
        r"not sit at the same.*'c'",
    ),
    "fusion of a lora": (
        lambda m: m.add_adapter_fusion(["a", "b"]),
        CompositionError,
        "at .*query sits another part of 'b'",
    ),
    "fusion of no bottleneck": (
        lambda m: m.add_adapter_fusion(["b"]),
        CompositionError,
        "none of them is a bottleneck",
    ),
    "fusion of a number": (lambda m: m.add_adapter_fusion(3), AdapterError, "Invalid AdapterFusion definition: 3"),
    "unknown fusion config": (
        lambda m: m.add_adapter_fusion(["a", "d"], "dynamite"),
        ValueError,
        "did you mean 'dynamic'",
    ),
    "missing fusion": (
        lambda m: m.set_active_adapters(Fuse("d", "a")),
        CompositionError,
        r"no fusion named 'd,a'.*'a,d'",
    ),
    "missing fusion, trained": (lambda m: m.train_adapter_fusion(Fuse("d", "a")), CompositionError, "no fusion named"),
    "fusing loras": (lambda m: m.set_active_adapters(Fuse("b", "b")), CompositionError, "works on bottleneck adapters"),
    "no block": (lambda m: m.set_active_adapters(3), TypeError, "3: a setup is an adapter name"),
    "wrong nesting": (
        lambda m: m.set_active_adapters(Fuse("a", Parallel("a", "d"))),
        CompositionError,
        "cannot nest Parallel in Fuse",
    ),
    "too deep": (
        lambda m: m.set_active_adapters(Stack(Split(Split("a", "a", splits=1), "a", splits=2))),
        CompositionError,
        "too deep",
    ),
    "unknown in fusion block": (lambda m: m.set_active_adapters(Fuse("a", "zz")), UnknownAdapterError, "'zz'"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_changes_nothing(model, call, error: type[Exception], message: str) -> None:
    before = state(model)
    with pytest.raises(error, match=f"(?s){message}"):
        call(model)
    assert state(model) == before


RUNS = {
    "rows": (
        BatchSplit("a", "b", batch_sizes=[3, 3]),
        {},
        r"BatchSplit\(batch_sizes=\[3, 3\]\): sizes sum to 6.* 4 rows",
    ),
    "positions": (Split("a", "c", splits=[2, 2]), {}, r"Split\(splits=\[2, 2\]\): sizes sum to 4.* 6 positions"),
    "unknown": ("zz", {}, r"AdapterSetup\(Stack\[zz\]\): this model has no adapter named 'zz'"),
    "no tasks": (MultiTask("a", "b"), {}, "the forward call has no task_ids"),
    "unknown task": (MultiTask("a", "b"), {"task_ids": ["a", "b", "c", "a"]}, r"'c' is no child.*\['a', 'b'\]"),
    "missing fusion": (Fuse("d", "a"), {}, "no fusion named 'd,a'"),
}


@pytest.mark.parametrize(("setup", "kwargs", "message"), RUNS.values(), ids=RUNS)
def test_a_refused_pass_leaves_the_model_usable(model, setup, kwargs, message: str) -> None:
    before, expected = state(model), output(model, inputs("bert"))
    with pytest.raises(AdapterError, match=f"(?s){message}"):
        run(model, inputs("bert"), setup, **kwargs)
    assert AdapterSetup.get_context() is None
    assert state(model) == before
    assert torch.equal(output(model, inputs("bert")), expected)


@pytest.mark.parametrize("tasks", [[0, 1, 2, 0], [0, 1], [-1, 0, 0, 0]], ids=["beyond", "too few", "negative"])
def test_task_ids_that_do_not_fit(model, tasks: list[int]) -> None:
    with pytest.raises(CompositionError, match="task_ids"):
        run(model, inputs("bert"), MultiTask("a", "b"), task_ids=torch.tensor(tasks))


def test_weights_of_prefixes_are_not_negative() -> None:
    model = adapted("bert", "prefix_tuning", "prefix_tuning_flat")
    with pytest.raises(CompositionError, match=r"Average\(weights=\[2\.0, -1\.0\]\).*at least 0"):
        run(model, inputs("bert"), Average("prefix_tuning", "prefix_tuning_flat", weights=[2, -1]))


def test_prefixes_need_an_attention_they_can_enter() -> None:
    """Longformer's scores are cut into windows."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = AutoModel.from_config(LongformerConfig(attention_window=[4], **sizes, **{**TEXT, "type_vocab_size": 1}))
    adapters.init(model)
    before = state(model)
    with pytest.raises(AdapterError, match=r"the attention at encoder.layer.0.*; use LoRA or a bottleneck"):
        model.add_adapter("x", "prefix_tuning")
    assert state(model) == before


def test_blocks_say_what_is_wrong_with_their_sizes() -> None:
    with pytest.raises(CompositionError, match=r"Split\(splits=\[1\]\): 1 sizes for 2 children"):
        Split("a", "b", splits=[1])
    with pytest.raises(CompositionError, match=r"Split\(splits=\[None, None\]\): only one child can get what"):
        Split("a", "b", splits=[None, None])
    for sizes in ([1, -1], [1, None]):
        with pytest.raises(CompositionError, match=r"sizes are whole numbers of at least 0"):
            BatchSplit("a", "b", batch_sizes=sizes)
    with pytest.raises(CompositionError, match=r"3 weights for 2 children"):
        Average("a", "b", weights=[1, 1, 1])
    with pytest.raises(CompositionError, match=r"weights sum to 0"):
        Average("a", "b", weights=[1, -1])


def test_init_takes_models_of_transformers_only() -> None:
    with pytest.raises(AdapterError, match=r"adapters\.init\(Linear\): it is no transformers model"):
        adapters.init(torch.nn.Linear(2, 2))
    model = plain("bert")
    with pytest.raises(AdapterError, match="it is of type object; give an AdapterModelInterface"):
        adapters.init(model, interface=object())
    assert type(model) is type(plain("bert"))


def test_nothing_active_is_none(model) -> None:
    fresh = adapted("bert")
    assert fresh.active_adapters is None
    fresh.set_active_adapters([])
    assert fresh.active_adapters is None
    assert fresh.get_adapter("zz") == {}
    fresh.delete_adapter("zz")
    fresh.delete_adapter_fusion("zz")
    assert not fresh.has_adapters()
