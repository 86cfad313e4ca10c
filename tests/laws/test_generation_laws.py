"""``generate`` with a cache gives what it gives without one."""

import pytest
import torch
from tiny_models import DECODERS, GATED, GENERATORS, adapted, inputs, rows_of

from adapters import AdapterSetup, Average, BatchSplit, MultiTask, Parallel, Stack

GENERATED = ("lora", "ia3", "double_seq_bn", "adapter_plus", "prefix_tuning", "unipelt")
_MODELS: dict[str, torch.nn.Module] = {}


def model_of(name: str):
    if name not in _MODELS:
        _MODELS[name] = adapted(name, *GENERATED, head=True)
    return _MODELS[name]


def prompts(name: str) -> dict[str, torch.Tensor]:
    """Padded on the left for decoders, as generation wants it."""
    batch = inputs(name, rows=3, side="left" if name in DECODERS else "right")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def generate(name: str, batch: dict[str, torch.Tensor], setup, **kwargs):
    """The tokens and their scores; no end token, so that all rows are of one length."""
    with torch.no_grad(), AdapterSetup(setup):
        found = model_of(name).generate(
            **batch,
            **({"num_beams": 1} | kwargs),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    return found.sequences, torch.stack(found.scores).nan_to_num(neginf=-1e9)


each_generator = pytest.mark.parametrize("name", GENERATORS)
each_method = pytest.mark.parametrize("method", GENERATED)
# A gate is the mean over the positions that a pass sees: with a cache that is the newest alone.
each_causal_method = pytest.mark.parametrize("method", [method for method in GENERATED if method not in GATED])
each_search = pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])


@each_generator
@each_causal_method
@each_search
def test_cache_is_no_cache(name: str, method: str, beams: int) -> None:
    batch = prompts(name)
    for setup in (method, BatchSplit(method, None, "lora", batch_sizes=1), Average(method, "lora")):
        tokens, scores = generate(name, batch, setup, use_cache=True, num_beams=beams)
        slow_tokens, slow_scores = generate(name, batch, setup, use_cache=False, num_beams=beams)
        assert torch.equal(tokens, slow_tokens)
        torch.testing.assert_close(scores, slow_scores, rtol=1e-3, atol=1e-4)
    assert (scores - generate(name, batch, None, num_beams=beams)[1]).abs().max() > 1e-3


@each_generator
@each_method
def test_rows_are_generated_as_by_themselves(name: str, method: str) -> None:
    batch, children = prompts(name), [method, Stack("lora", method), None]
    alone = [generate(name, rows_of(batch, [row]), child) for row, child in enumerate(children)]
    for setup, more in (
        (BatchSplit(*children, batch_sizes=1), {}),
        (MultiTask(*children), {"task_ids": torch.tensor([0, 1, 2])}),
    ):
        tokens, scores = generate(name, batch, setup, **more)
        assert torch.equal(tokens, torch.cat([tokens for tokens, _ in alone]))
        torch.testing.assert_close(scores, torch.cat([scores for _, scores in alone], 1), rtol=1e-3, atol=1e-4)


@each_generator
@each_method
@each_search
def test_an_adapter_for_each_row(name: str, method: str, beams: int) -> None:
    batch, names = prompts(name), [method, None, "lora"]
    alone = [generate(name, rows_of(batch, [row]), child, num_beams=beams)[0] for row, child in enumerate(names)]
    tokens, _ = generate(name, batch, None, adapter_names=names, num_beams=beams)
    assert torch.equal(tokens, torch.cat(alone))


@each_generator
@each_method
@each_search
def test_parallel_generates_for_each_channel(name: str, method: str, beams: int) -> None:
    batch, children = prompts(name), [method, Stack("lora", method), None]
    tokens, _ = generate(name, batch, Parallel(*children), num_beams=beams)
    assert torch.equal(tokens, torch.cat([generate(name, batch, child, num_beams=beams)[0] for child in children]))


@pytest.mark.parametrize("name", GENERATORS)
def test_static_setups_are_used_as_contexts_are(name: str) -> None:
    batch, model = prompts(name), model_of(name)
    within = generate(name, batch, "lora")[0]
    model.set_active_adapters("lora")
    try:
        tokens = model.generate(**batch, num_beams=1, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    finally:
        model.set_active_adapters(None)
    assert torch.equal(tokens, within)


@pytest.mark.parametrize("name", DECODERS)
@each_causal_method
def test_drafted_tokens_are_those_of_greedy_search(name: str, method: str) -> None:
    """Prompt lookup: several drafted tokens are checked in one pass."""
    batch = rows_of(prompts(name), [0])
    expected, _ = generate(name, batch, method)
    assert torch.equal(generate(name, batch, method, prompt_lookup_num_tokens=2)[0], expected)
