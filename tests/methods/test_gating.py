"""What gates say of themselves: ``output_adapter_gating_scores`` for every gated method, union and block.

``adapter_gating_scores[adapter][layer][location]`` has a row for each row of the batch that the adapter saw, in their
order, and where a location has several gates a column for each.
"""

import numpy as np
import pytest
import torch
from tiny_models import GATED, inputs, rows_of, shared

from adapters import AdapterSetup, Average, BatchSplit, MultiTask, Parallel, Split, Stack

MODELS = ("bert", "gpt2", "t5", "bart")
each_model = pytest.mark.parametrize("name", MODELS)
each_method = pytest.mark.parametrize("method", GATED)


def gates(name: str, batch: dict[str, torch.Tensor], setup, **more) -> dict:
    with torch.no_grad(), AdapterSetup(setup):
        return shared(name)(**batch, output_adapter_gating_scores=True, **more)["adapter_gating_scores"]


def assert_rows(found: dict, alone: dict, rows=slice(None)) -> None:
    """The scores of one adapter are those of these rows when it acts alone on the whole batch."""
    assert found.keys() == alone.keys()
    for layer, places in alone.items():
        assert found[layer].keys() == places.keys()
        for place, values in places.items():
            np.testing.assert_allclose(found[layer][place], values[rows], rtol=1e-4, atol=1e-5, err_msg=place)


@each_model
@each_method
def test_every_row_has_its_own(name: str, method: str) -> None:
    """In all blocks that share a batch out, and where adapters are given by row."""
    batch, a, b = inputs(name), f"{method}_a", f"{method}_b"
    alone = {adapter: gates(name, batch, adapter)[adapter] for adapter in (a, b)}
    tasks = torch.tensor([1, 0, 1, 1])
    shares = {
        BatchSplit(a, b, batch_sizes=[1, 3]): ([0], [1, 2, 3], {}),
        BatchSplit(b, None, a, batch_sizes=[2, 1, 1]): ([3], [0, 1], {}),
        BatchSplit(a, b, a, batch_sizes=[1, 1, 2]): ([0, 2, 3], [1], {}),
        MultiTask(a, b): ([1], [0, 2, 3], {"task_ids": tasks}),
        Parallel(a, b): (slice(None), slice(None), {}),
    }
    for setup, (first, second, more) in shares.items():
        found = gates(name, batch, setup, **more)
        assert found.keys() == {a, b}
        assert_rows(found[a], alone[a], first)
        assert_rows(found[b], alone[b], second)
    by_row = gates(name, batch, None, adapter_names=[b, None, a, b])
    assert_rows(by_row[a], alone[a], [2])
    assert_rows(by_row[b], alone[b], [0, 3])


@each_model
@each_method
def test_padding_is_not_seen(name: str, method: str) -> None:
    """So 1.3.0's scores of unpadded rows (tests/parity/test_gates.py) are those of padded ones too."""
    batch, adapter = inputs(name), f"{method}_a"
    whole = gates(name, batch, adapter)[adapter]
    for row in range(4):
        single = rows_of(batch, [row])
        for mask in [key for key in batch if key.endswith("mask")]:
            tokens, length = mask.replace("attention_mask", "input_ids"), int(single[mask].sum())
            single |= {tokens: single[tokens][:, :length], mask: single[mask][:, :length]}
        assert_rows(gates(name, single, adapter)[adapter], whole, [row])


@each_model
@each_method
def test_adapters_that_share_rows_report_each(name: str, method: str) -> None:
    """One after the other, and averaged: all rows at every place. The first gate of a sees the model's own states."""
    batch, a, b = inputs(name), f"{method}_a", f"{method}_b"
    alone = {adapter: gates(name, batch, adapter)[adapter] for adapter in (a, b)}
    first_layer = min(alone[a])
    for setup in (Stack(a, b), Average(a, b)):
        found = gates(name, batch, setup)
        for adapter in (a, b):
            shapes = {
                layer: {place: v.shape for place, v in places.items()} for layer, places in found[adapter].items()
            }
            assert shapes == {
                layer: {place: v.shape for place, v in places.items()} for layer, places in alone[adapter].items()
            }
        place = next(iter(alone[a][first_layer]))
        first, other = (np.reshape(scores[a][first_layer][place], (4, -1))[:, 0] for scores in (found, alone))
        np.testing.assert_allclose(first, other, atol=1e-5)


@each_model
def test_below_parallel_there_is_a_row_for_each_channel(name: str) -> None:
    batch = inputs(name)
    found = gates(name, batch, Stack("gated_lora_a", Parallel("gated_bn_a", "gated_bn_b")))
    for layer, places in found["gated_lora_a"].items():
        assert {len(values) for values in places.values()} == {8}, layer
    assert {len(v) for places in found["gated_bn_b"].values() for v in places.values()} == {4}


@each_model
def test_unions_report_all_their_gates_in_every_block(name: str) -> None:
    """Each member at its own location, beside the gates of another method in the same batch."""
    batch = inputs(name)
    found = gates(name, batch, BatchSplit("unipelt_a", Stack("gated_bn_b", "unipelt_b"), batch_sizes=[3, 1]))
    alone = gates(name, batch, "unipelt_a")["unipelt_a"]
    assert_rows(found["unipelt_a"], alone, [0, 1, 2])
    assert found["unipelt_b"].keys() == found["gated_bn_b"].keys() == alone.keys()
    for layer, places in alone.items():
        prefix = {"encoder_prefix", "self_prefix", "cross_prefix"} & places.keys()
        assert places.keys() == {"selfattn_lora", "output_adapter", *prefix}
        assert prefix
        assert {len(values) for values in found["unipelt_b"][layer].values()} == {1}


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
@each_method
def test_a_part_of_the_sequence_has_a_gate_over_its_own_tokens(name: str, method: str) -> None:
    """However much padding follows, in a split, in a split of a split, and after another adapter in it."""
    adapter, other, plain = f"{method}_a", f"{method}_b", "lora_a"
    short = {key: value[:, :5] for key, value in inputs(name, rows=2).items()}
    short |= {
        key: torch.ones_like(value) if key.endswith("mask") else value.clamp(min=3) for key, value in short.items()
    }
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in short.items()}
    for setup in (
        Split(adapter, other, splits=[2, None]),
        Split(Split(adapter, None, splits=[1, None]), other, splits=[3, None]),
        Split(None, Stack(plain, adapter), splits=[1, None]),
        BatchSplit(other, Split(other, adapter, splits=[2, None]), batch_sizes=1),
    ):
        found, wanted = gates(name, longer, setup), gates(name, short, setup)
        assert found.keys() == wanted.keys()
        assert adapter in found
        for part, scores in wanted.items():
            assert_rows(found[part], scores)
