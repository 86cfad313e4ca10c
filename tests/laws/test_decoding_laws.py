"""Ways to decode beside greedy and beam search: as separate calls, token for token; streamed; with a helper model."""

import threading

import pytest
import torch
from test_generation_laws import generate, model_of, prompts
from tiny_models import DECODERS, GENERATORS, adapted, disturb, rows_of
from transformers.generation.streamers import BaseStreamer

from adapters import (
    AdapterSetup,
    Average,
    BatchSplit,
    CompositionError,
    Fuse,
    MultiTask,
    Parallel,
    Route,
    RouterConfig,
    Split,
    Stack,
)

CHILDREN = ["lora", Stack("lora", "adapter_plus"), None]
TASKS = {"task_ids": torch.tensor([0, 1, 2])}
BLOCKS = {
    "batch_split": (BatchSplit(*CHILDREN, batch_sizes=1), {}),
    "multitask": (MultiTask(*CHILDREN), TASKS),
    "rows": (None, {"adapter_names": CHILDREN}),
    "parallel": (Parallel(*CHILDREN), {}),
}
each_generator = pytest.mark.parametrize("name", GENERATORS)
WAYS = {
    "sequences": {"num_beams": 3, "num_return_sequences": 2},
    # sampling among one token is deterministic, and yet all of sampling
    "sampled": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "static_cache": {"cache_implementation": "static"},
    "guided": {"guidance_scale": 1.5},
}


def tokens(name: str, batch, setup, **kwargs) -> torch.Tensor:
    with torch.no_grad(), AdapterSetup(setup):
        arguments = {"num_beams": 1, "do_sample": False} | kwargs
        return model_of(name).generate(**batch, **arguments, max_new_tokens=4, min_new_tokens=4)


# transformers guides decoders alone
DECODINGS = [
    (name, block, way) for way in WAYS for block in BLOCKS for name in GENERATORS if way != "guided" or name in DECODERS
]


@pytest.mark.parametrize(("name", "block", "way"), DECODINGS)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_rows_are_decoded_as_by_themselves(name: str, block: str, way: str) -> None:
    batch, (setup, more), ways = prompts(name), BLOCKS[block], WAYS[way]
    if block == "parallel":
        expected = [tokens(name, batch, child, **ways) for child in CHILDREN]
    else:
        expected = [tokens(name, rows_of(batch, [row]), child, **ways) for row, child in enumerate(CHILDREN)]
    assert torch.equal(tokens(name, batch, setup, **more, **ways), torch.cat(expected))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_fused_and_routed_rows_need_no_cache(name: str, beams: int) -> None:
    model = adapted(name, "lora", "seq_bn", "par_bn", head=True)
    model.add_adapter("gate", RouterConfig(experts=["lora", "seq_bn"]))
    disturb(model, "gate")
    model.add_adapter_fusion(["seq_bn", "par_bn"], "static")
    batch, setups = (
        prompts(name),
        [Fuse("seq_bn", "par_bn"), Route("lora", "seq_bn", gate="gate"), Average("lora", None)],
    )
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    alone = [model.generate(**rows_of(batch, [row]), adapter_names=s, **limits) for row, s in enumerate(setups)]
    for cached in (True, False):
        found = model.generate(**batch, adapter_names=setups, use_cache=cached, **limits)
        assert torch.equal(found, torch.cat(alone))


GROWING = {
    "rest": Split("lora", "adapter_plus", splits=[3, None]),
    "prefix": Split("prefix_tuning", Stack("lora", "double_seq_bn"), splits=[7, None]),
    "nested": Split(
        Split("lora", None, splits=[1, None]), Split("ia3", "adapter_plus", splits=[3, None]), splits=[4, None]
    ),
}


@each_generator
@pytest.mark.parametrize("case", GROWING)
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_each_position_has_its_part_of_a_split(name: str, case: str, ways: dict) -> None:
    """A position goes to one child for good, so tokens with a cache are those without."""
    batch, setup = prompts(name), GROWING[case]
    found, scores = generate(name, batch, setup, **ways)
    plainly = {key: value for key, value in ways.items() if key != "cache_implementation"}
    wanted, slow_scores = generate(name, batch, setup, use_cache=False, **plainly)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(scores, slow_scores, rtol=1e-3, atol=1e-4)


@each_generator
def test_a_split_past_the_end_is_its_first_child(name: str) -> None:
    batch = prompts(name)
    for splits, child in (([99, None], "lora"), ([0, None], "adapter_plus")):
        found = generate(name, batch, Split("lora", "adapter_plus", splits=splits))
        wanted = generate(name, batch, child)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-4)


class Gathering(BaseStreamer):
    """Keeps what is streamed."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.view(len(value), -1))

    def end(self) -> None:
        self.ended = True


@each_generator
def test_tokens_are_streamed_as_they_come(name: str) -> None:
    """Also from a thread, as ``TextIteratorStreamer`` is used: `adapter_names` goes with the call."""
    batch, found = rows_of(prompts(name), slice(0, 2)), []
    names = ["lora", "adapter_plus"]
    expected = tokens(name, batch, None, adapter_names=names)
    streamer = Gathering()
    work = {"adapter_names": names, "streamer": streamer}
    thread = threading.Thread(target=lambda: found.append(tokens(name, batch, None, **work)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.parts, 1), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("setup", ["lora", Average("lora", "adapter_plus"), Stack("lora", "adapter_plus")], ids=str)
def test_a_helper_model_changes_no_token(name: str, setup) -> None:
    """With adapters of its own, or of none: `adapter_names` of a call concern the model that was called."""
    batch = rows_of(prompts(name), [0])
    expected = tokens(name, batch, setup)
    helper = adapted(name, "seq_bn", head=True)
    helper.set_active_adapters("seq_bn")
    assert torch.equal(tokens(name, batch, None, adapter_names=setup, assistant_model=helper), expected)
    model = model_of(name)
    assert torch.equal(tokens(name, batch, setup, assistant_model=model), expected)
    assert helper.active_adapters == Stack("seq_bn")
    many = {"adapter_names": CHILDREN, "assistant_model": helper}
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        tokens(name, prompts(name), None, **many)
    assert AdapterSetup.get_contexts() == []


@pytest.mark.parametrize("way", ["penalty_alpha", "num_beam_groups", "force_words_ids", "dola_layers"])
def test_what_transformers_keeps_outside_of_itself_is_refused_by_it(way: str) -> None:
    values = {"penalty_alpha": 0.6, "num_beam_groups": 2, "force_words_ids": [[7]], "dola_layers": "low"}
    more = {"penalty_alpha": {"top_k": 4}}.get(way, {} if way == "dola_layers" else {"num_beams": 2})
    if way == "num_beam_groups":
        more |= {"diversity_penalty": 0.5}
    with pytest.raises(ValueError, match="trust_remote_code"):
        tokens("gpt2", prompts("gpt2"), Parallel(*CHILDREN), **{way: values[way]}, **more)
    assert AdapterSetup.get_contexts() == []


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoding_of_ones_own_may_repeat_rows_in_place(name: str) -> None:
    """As contrastive search does, which has a row for each candidate."""

    def search(model, input_ids, **kwargs):
        mask = kwargs["attention_mask"] if kwargs["attention_mask"] is not None else torch.ones_like(input_ids)
        logits = model(input_ids, attention_mask=mask).logits
        again = model(input_ids.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0)).logits
        torch.testing.assert_close(again[::2], logits, rtol=1e-4, atol=1e-5)
        return logits[:, -1].argmax(-1)

    batch = prompts(name)
    found = tokens(name, batch, None, adapter_names=CHILDREN, custom_generate=search)
    alone = [tokens(name, rows_of(batch, [row]), c, custom_generate=search) for row, c in enumerate(CHILDREN)]
    assert torch.equal(found, torch.cat(alone))


REFUSED = {
    "split": (Split("lora", "adapter_plus", splits=3), {}, "the sequence grows"),
    "split_in_split": (Split(Split("lora", "ia3", splits=2), None, splits=[4, None]), {}, "the sequence grows"),
    "split_end": (Stack("lora", Split("lora", "ia3", splits=[None, 2])), {}, r"all that is left: splits=\[…, None\]"),
    "batch_split": (BatchSplit("lora", "adapter_plus", batch_sizes=2), {}, "sizes sum to 4, the batch has 3 rows"),
    "names": (None, {"adapter_names": ["lora"]}, "1 entries, the batch has 3 rows"),
    "tasks": (MultiTask("lora", "adapter_plus"), {}, "has no task_ids"),
    "too few tasks": (MultiTask("lora", "adapter_plus"), {"task_ids": torch.tensor([0])}, "1 entries, the batch has 3"),
    "unknown": (None, {"adapter_names": "zz"}, "no adapter named 'zz'"),
}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_pass(name: str, case: str) -> None:
    (setup, more, message), calls, model = REFUSED[case], [], model_of(name)
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises((CompositionError, ValueError), match=message):
        tokens(name, prompts(name), setup, **more)
    handle.remove()
    assert not calls
    assert AdapterSetup.get_contexts() == []


def test_prompts_of_a_generation_are_checked_once() -> None:
    """A generation by beams after a refused one is that of ever."""
    batch = prompts("gpt2")
    expected, _ = generate("gpt2", batch, "lora", num_beams=2)
    with pytest.raises(CompositionError):
        tokens("gpt2", batch, BatchSplit("lora", "lora", batch_sizes=1))
    assert torch.equal(generate("gpt2", batch, "lora", num_beams=2)[0], expected)
