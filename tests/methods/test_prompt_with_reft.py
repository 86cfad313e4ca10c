"""Prompts and ReFT together: positions are those of the tokens, in ``generate`` with a cache as without."""

import pytest
import torch
from tiny_models import DECODERS, GENERATORS, adapted, changed, disturb, inputs, rows_of

from adapters import AdapterSetup, BatchSplit, ConfigUnion, LoReftConfig, NoReftConfig, PromptTuningConfig, Stack

PROMPT = PromptTuningConfig(prompt_length=3)
REFTS = {
    "suffix": NoReftConfig(r=2, prefix_positions=0, suffix_positions=2, non_linearity="tanh"),
    "both": LoReftConfig(r=2, prefix_positions=1, suffix_positions=1),
}
_MODELS: dict[str, torch.nn.Module] = {}


def model_of(name: str):
    if name not in _MODELS:
        model = adapted(name, head=True)
        for reft, config in REFTS.items():
            model.add_adapter(reft, config)
            model.add_adapter(f"{reft}_union", ConfigUnion(PROMPT, config))
        for prompt, length in (("prompt", 3), ("short", 1)):
            model.add_adapter(prompt, changed(PROMPT, prompt_length=length))
        for adapter in model.adapters_config:
            disturb(model, adapter, 0.5)
        _MODELS[name] = model
    return _MODELS[name]


def generate(name: str, batch: dict[str, torch.Tensor], setup, **kwargs):
    """The tokens and their scores, without an end token."""
    with torch.no_grad(), AdapterSetup(setup):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
        found = model_of(name).generate(**batch, **(options | kwargs), output_scores=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.scores).nan_to_num(neginf=-1e9)


def prompts(name: str) -> dict[str, torch.Tensor]:
    batch = inputs(name, side="left" if name in DECODERS else "right")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("reft", REFTS)
@pytest.mark.parametrize("beams", [1, 2])
def test_cache_is_no_cache(name: str, reft: str, beams: int) -> None:
    batch, setups = prompts(name), [Stack("prompt", reft), Stack(reft, "prompt"), f"{reft}_union"]
    setups.append(BatchSplit(Stack("prompt", reft), Stack("short", reft), reft, None, batch_sizes=1))
    for setup in setups:
        tokens, scores = generate(name, batch, setup, use_cache=True, num_beams=beams)
        slow_tokens, slow_scores = generate(name, batch, setup, use_cache=False, num_beams=beams)
        assert torch.equal(tokens, slow_tokens), setup
        torch.testing.assert_close(scores, slow_scores, rtol=1e-3, atol=1e-4)
    prompt_alone = generate(name, batch, "prompt", num_beams=beams)[1]
    assert (generate(name, batch, setups[0], num_beams=beams)[1] - prompt_alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("reft", REFTS)
@pytest.mark.parametrize("cache", [True, False])
def test_rows_generate_what_they_do_alone(name: str, reft: str, cache: bool) -> None:
    """Prompts of different lengths in one batch move no position."""
    batch = prompts(name)
    children = [Stack("prompt", reft), Stack("short", reft), reft, f"{reft}_union"]
    alone = [generate(name, rows_of(batch, [row]), child, use_cache=cache) for row, child in enumerate(children)]
    tokens, scores = generate(name, batch, BatchSplit(*children, batch_sizes=1), use_cache=cache)
    assert torch.equal(tokens, torch.cat([tokens for tokens, _ in alone]))
    torch.testing.assert_close(scores, torch.cat([scores for _, scores in alone], 1), rtol=1e-3, atol=1e-4)
