"""Prefixes with every attention implementation and every kind of mask."""

import pytest
import torch
from tiny_models import (
    CONFIGS,
    DECODERS,
    ENCODER_DECODERS,
    PREFIXES,
    TEXT_MODELS,
    inputs,
    positions,
    rows_of,
    run,
    shared,
)

from adapters import AdapterError, Average, BatchSplit, Split, Stack

# GPT-2 has no flex attention in transformers, T5's fails in transformers with its position bias.
WITH_FLEX = [name for name in CONFIGS if name not in ("gpt2", "t5")]
each_prefix = pytest.mark.parametrize("method", PREFIXES)
# What torch says of transformers' own calls.
without_compiling = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:_compile flag on create_block_mask:DeprecationWarning",
)
each_side = pytest.mark.parametrize("side", ["right", "left"])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-5)


def real(name: str, values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The positions that are no padding: what an implementation gives at the others is its own affair."""
    mask = batch.get("decoder_attention_mask" if name in ENCODER_DECODERS else "attention_mask")
    return values if mask is None else values[mask.bool()]


def unweighted(method: str) -> list:
    a, b = f"{method}_a", f"{method}_b"
    return [a, Stack(a, b), BatchSplit(a, "prefix_tuning_flat_b", None, batch_sizes=[1, 2, 1])]


def weighted(name: str, method: str) -> list:
    a, b = f"{method}_a", f"{method}_b"
    return [Average(a, b, weights=[0.2, 0.8]), Split(a, b, splits=[2, positions(name) - 2])]


@pytest.fixture
def with_implementation():
    """Runs a setup of the shared model with an attention implementation, and puts the model's own back."""
    changed = {}

    def run_with(implementation: str, name: str, batch: dict[str, torch.Tensor], setup) -> torch.Tensor:
        model = shared(name)
        changed[name] = changed.get(name, model.config._attn_implementation)
        model.set_attn_implementation(implementation)
        return real(name, run(model, batch, setup), batch)

    yield run_with
    for name, implementation in changed.items():
        shared(name).set_attn_implementation(implementation)


@each_side
@pytest.mark.parametrize("name", CONFIGS)
@each_prefix
def test_eager_and_sdpa_agree(name: str, method: str, side: str, with_implementation) -> None:
    batch = inputs(name, side=side)
    for setup in [*unweighted(method), *weighted(name, method)]:
        eager, sdpa = (with_implementation(kind, name, batch, setup) for kind in ("eager", "sdpa"))
        close(eager, sdpa)


@pytest.mark.parametrize("name", WITH_FLEX)
@each_prefix
@without_compiling
def test_flex_agrees_where_prefixes_have_no_weights(name: str, method: str, with_implementation) -> None:
    batch = inputs(name, side="left" if name in DECODERS else "right")
    with torch.compiler.set_stance("force_eager"):
        for setup in unweighted(method):
            flex, sdpa = (with_implementation(kind, name, batch, setup) for kind in ("flex_attention", "sdpa"))
            close(flex, sdpa)


@without_compiling
def test_flex_refuses_weights(with_implementation) -> None:
    with torch.compiler.set_stance("force_eager"), pytest.raises(AdapterError, match="takes no weights on prefixes"):
        with_implementation("flex_attention", "llama", inputs("llama"), weighted("llama", "prefix_tuning")[0])


@pytest.mark.parametrize("name", TEXT_MODELS)
@each_prefix
def test_padding_changes_nothing(name: str, method: str) -> None:
    """A row padded on the right gives what the same row gives by itself; causal positions do not move."""
    batch, model, setup = inputs(name), shared(name), f"{method}_a"
    padded = run(model, batch, setup)
    row = rows_of(batch, [1])
    row |= {key: row[key][:, :4] for key in ("input_ids", "attention_mask")}
    alone = run(model, row, setup)
    close(padded[1:2, : alone.shape[1]], alone)


@pytest.mark.parametrize("name", TEXT_MODELS)
@each_prefix
def test_no_mask_is_a_mask_of_ones(name: str, method: str) -> None:
    batch, model, setup = inputs(name), shared(name), f"{method}_a"
    masked = {key: torch.ones_like(value) if key.endswith("mask") else value for key, value in batch.items()}
    unmasked = {key: value for key, value in batch.items() if not key.endswith("mask")}
    close(run(model, unmasked, setup), run(model, masked, setup))


def test_a_sliding_window_always_sees_the_prefix() -> None:
    """Mistral's last position sees the last 3 tokens and the whole prefix: earlier tokens change nothing."""
    model, batch = shared("mistral"), inputs("mistral", rows=1)
    model.set_attn_implementation("sdpa")
    far = {**batch, "input_ids": batch["input_ids"].clone()}
    far["input_ids"][0, 0] = (far["input_ids"][0, 0] + 1) % 40 + 3
    near = run(model, batch, "prefix_tuning_a")
    close(run(model, far, "prefix_tuning_a")[:, -1], near[:, -1])
    assert (near - run(model, batch, None))[:, -1].abs().max() > 1e-3
