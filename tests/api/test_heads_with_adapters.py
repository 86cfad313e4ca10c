"""Heads and adapters together: which head an adapter brings, and which rows a head gets."""

import copy
import pickle

import pytest
import torch
from head_models import (
    ADD,
    TEXT_MODELS,
    batch,
    two_heads,
    with_adapters,
)

import adapters.composition as ac
from adapters import AdapterSetup, AutoAdapterModel


@pytest.mark.parametrize(
    ("setup", "heads"),
    [
        (lambda: "a", "a"),
        (lambda: ac.Stack("b", "a"), "a"),
        (lambda: ac.Parallel("a", "b"), ["a", "b"]),
        (lambda: ac.BatchSplit("a", "b", batch_sizes=[1, 1]), ac.BatchSplit("a", "b", batch_sizes=[1, 1])),
        (lambda: ac.Average("a", "a"), "b"),
        (lambda: "headless", "b"),
        (lambda: ac.Parallel("a", "headless"), "b"),
        (lambda: None, "b"),
    ],
)
def test_set_active_adapters_switches_the_heads_it_finds(setup, heads):
    model = with_adapters()
    model.add_adapter("headless", "lora")
    model.active_head = "b"
    model.set_active_adapters(setup())
    assert model.active_head == heads


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("by_context", [False, True])
def test_parallel_equals_separate_runs(name, by_context):
    model = with_adapters(name)
    inputs, labels = batch(name), torch.tensor([1, 0])
    separate = []
    for adapter in ("a", "b"):
        model.set_active_adapters(adapter)
        separate.append(model(**inputs, labels=labels))
    assert not torch.allclose(separate[0].logits, separate[1].logits[:, :2], atol=1e-3)
    setup = ac.Parallel("a", "b")
    if by_context:
        model.set_active_adapters(None)
        with AdapterSetup(setup):
            output = model(**inputs, labels=labels)
    else:
        model.set_active_adapters(setup)
        output = model(**inputs, labels=labels)
    for part, expected in zip(output, separate, strict=True):
        torch.testing.assert_close(part.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.loss, expected.loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output["loss"], separate[0].loss + separate[1].loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_each_row_has_the_head_of_its_adapter(name):
    model = with_adapters(name)
    inputs, labels = batch(name, rows=3), torch.tensor([1, 0, 1])
    output = model(**inputs, labels=labels, adapter_names=["b", "a", "b"])
    for part, adapter, rows in zip(output, ("b", "a"), ([0, 2], [1]), strict=True):
        alone = {key: value[rows] for key, value in inputs.items()}
        with AdapterSetup(adapter):
            expected = model(**alone, labels=labels[rows])
        torch.testing.assert_close(part.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.loss, expected.loss, atol=1e-5, rtol=1e-4)
    model.active_head = "a"
    assert model(**inputs, adapter_names=["b", None, "a"]).logits.shape[0] == 3  # no head is that of no adapter


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_batch_split_of_adapters_and_heads_equals_separate_runs(name):
    model = with_adapters(name)
    inputs = batch(name, rows=3)
    model.set_active_adapters(ac.BatchSplit("a", "b", batch_sizes=[1, 2]))
    output = model(**inputs, labels=torch.tensor([1, 0, 2]))
    for part, adapter, rows in zip(output, ("a", "b"), (slice(0, 1), slice(1, 3)), strict=True):
        model.set_active_adapters(adapter)
        expected = model(**{key: value[rows] for key, value in inputs.items()})
        torch.testing.assert_close(part.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_parallel_adapters_need_as_many_heads():
    model = with_adapters()
    model.set_active_adapters(ac.Parallel("a", "b"))
    model.active_head = "a"
    with pytest.raises(ValueError, match=r"parallel adapters \(2\).*active heads \(1\) must match"):
        model(**batch("bert"))


def test_an_adapter_setup_with_a_head_that_is_missing_keeps_the_active_one():
    model = with_adapters()
    model.add_adapter("headless", "lora")
    with AdapterSetup("headless"):
        assert model(**batch("bert")).logits.shape == (2, 3)
    with AdapterSetup("a"):
        assert model(**batch("bert")).logits.shape == (2, 2)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_training_an_adapter_trains_its_head_but_no_output_embeddings(name):
    model = with_adapters(name)
    ADD["seq2seq_lm" if name == "t5" else "causal_lm"](model, "lm")
    model.active_head = "lm"
    model.train_adapter("a")
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.requires_grad for parameter in model.heads["a"].parameters())
    assert not model.heads["lm"].get_output_embeddings().weight.requires_grad
    assert not [key for key in trainable if not key.startswith("heads.") and ".a." not in key]


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_models_come_back_with_adapters_and_heads(name, tmp_path):
    model = with_adapters(name)
    model.save_pretrained(tmp_path)
    again = AutoAdapterModel.from_pretrained(tmp_path)
    assert set(again.adapters_config.adapters) == {"a", "b"} and again.active_adapters is None
    for adapter in ("a", "b"):
        model.set_active_adapters(adapter)
        again.set_active_adapters(adapter)
        assert again.active_head == adapter
        assert torch.equal(again(**batch(name)).logits, model(**batch(name)).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_complete_and_independent(copied):
    model = with_adapters()
    model.add_masked_lm_head("mlm")
    model.set_active_adapters("a")
    expected = model(**batch("bert")).logits
    again = copied(model)
    assert torch.equal(again(**batch("bert")).logits, expected)
    assert (
        again.heads["mlm"][3].weight is again.get_input_embeddings().weight is not model.get_input_embeddings().weight
    )
    again.delete_head("a")
    again.delete_adapter("a")
    assert torch.equal(model(**batch("bert")).logits, expected) and "a" in model.config.prediction_heads


def test_adapter_to_moves_the_head_of_the_same_name():
    model = two_heads()
    model.add_adapter("a")
    model.adapter_to("a", dtype=torch.float64)
    assert {p.dtype for p in model.heads["a"].parameters()} == {torch.float64}
    assert {p.dtype for p in model.heads["b"].parameters()} == {torch.float32}
