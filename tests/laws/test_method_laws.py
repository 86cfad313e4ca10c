"""The laws that every method keeps: methods × architectures. A method is entered in tests/tiny_models.py."""

import copy
import functools

import pytest
import torch
from test_composition_laws import close, snapshot
from tiny_models import (
    COUNTS,
    IDENTITY,
    MERGES,
    METHODS,
    MORE_METHODS,
    PROMPTS,
    REFUSED,
    ROUNDED,
    SHARED_COUNTS,
    WITHOUT_CACHE_LAW,
    adapted,
    changed,
    disturb,
    inputs,
    output,
    plain,
    positions,
    run,
)

import adapters
from adapters import AdapterError, Average, BatchSplit, MultiTask, Parallel, Split, Stack

ALL = {**METHODS, **MORE_METHODS}
ARCHITECTURES = ("bert", "gpt2", "llama", "t5")
COMPOSED = ("bert", "gpt2")


def cases(methods, names=ARCHITECTURES):
    """Pairs of an architecture and a method that it takes, the pairs of one method next to each other."""
    pairs = [(name, method) for method in sorted(methods) for name in names if name not in REFUSED.get(method, ())]
    return pytest.mark.parametrize(("name", "method"), pairs, ids=map("-".join, pairs))


each_case = cases(ALL)
each_composed = cases(MORE_METHODS, COMPOSED)


def fresh(name: str, method: str, head: bool = False, **fields):
    """A model with one adapter, as it is at its start."""
    model = adapted(name, head=head)
    model.add_adapter("x", changed(ALL[method], **fields))
    return model


@functools.cache
def pair(name: str, method: str, head: bool = False):
    """A model with two adapters `a` and `b` of a method, and a LoRA. Not to be changed."""
    model = adapted(name, head=head)
    for adapter, config in (("a", ALL[method]), ("b", ALL[method]), ("lora", METHODS["lora"])):
        model.add_adapter(adapter, config)
        disturb(model, adapter)
    return model


@functools.cache
def base(name: str, head: bool = False) -> torch.Tensor:
    return output(plain(name, head), inputs(name))


@cases(IDENTITY)
def test_a_new_adapter_is_the_identity(name: str, method: str) -> None:
    found = run(fresh(name, method), inputs(name), "x")
    assert (found - base(name)).abs().max() <= IDENTITY[method]


@cases(MORE_METHODS)
def test_off_is_the_base_model_and_on_is_not(name: str, method: str) -> None:
    model, batch = pair(name, method), inputs(name)
    assert torch.equal(output(model, batch), base(name))
    outputs = [run(model, batch, adapter) for adapter in ("a", "b")]
    assert all((one - base(name)).abs().max() > 1e-3 for one in outputs)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert torch.equal(run(model, batch, "a"), outputs[0])


@cases(MORE_METHODS)
def test_gradients_reach_the_adapter_and_nothing_else(name: str, method: str) -> None:
    model, batch = fresh(name, method), inputs(name)
    disturb(model, "x")
    model.train_adapter("x")
    own = {id(p) for module in model._modules_of("x") for p in module.parameters()}
    assert own
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    torch.manual_seed(3)
    hidden = model(**batch)[0]
    (hidden * torch.randn(hidden.shape)).sum().backward()
    still = [key for key, p in model.named_parameters() if id(p) in own and (p.grad is None or not p.grad.any())]
    assert still == []
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@cases(MORE_METHODS, COMPOSED)
def test_training_lowers_the_loss(name: str, method: str) -> None:
    model, batch = fresh(name, method, init_weights_seed=3), inputs(name)
    model.train_adapter("x")
    model.eval()
    target = base(name).roll(1, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = (model(**batch)[0][:, -positions(name) :] - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[1:]) < losses[0]


@cases(MORE_METHODS)
def test_delete_leaves_no_trace(name: str, method: str) -> None:
    model = adapted(name)
    before = snapshot(model)
    model.add_adapter("x", MORE_METHODS[method], set_active=True)
    disturb(model, "x")
    output(model, inputs(name))
    model.delete_adapter("x")
    assert snapshot(model) == before
    assert torch.equal(output(model, inputs(name)), base(name))


@each_case
def test_a_saved_adapter_is_loaded_as_it_was(name: str, method: str, tmp_path) -> None:
    head = name in ("gpt2", "t5")  # models with a head and base models
    model, batch = pair(name, method, head), inputs(name)
    model.save_adapter(tmp_path, "a")
    other = adapted(name, head=head)
    torch.manual_seed(99)
    other.load_adapter(tmp_path, load_as="again")
    assert list(other.state_dict()) == [
        key.replace(".a.", ".again.") for key in model.state_dict() if ".b." not in key and ".lora." not in key
    ]
    found, wanted = run(other, batch, "again"), run(model, batch, "a")
    assert torch.equal(found, wanted) or method in ROUNDED
    close(found, wanted)


@cases(MORE_METHODS, COMPOSED)
def test_a_copy_is_a_model_of_its_own(name: str, method: str) -> None:
    model, batch = pair(name, method), inputs(name)
    before = run(model, batch, "a")
    other = copy.deepcopy(model)
    assert torch.equal(run(other, batch, "a"), before)
    disturb(other, "a")
    assert not torch.equal(run(other, batch, "a"), before)
    assert torch.equal(run(model, batch, "a"), before)


@cases(ALL, ("gpt2", "t5"))
def test_half_precision(name: str, method: str) -> None:
    model, batch = copy.deepcopy(pair(name, method)), inputs(name)
    single = run(model, batch, "a")
    half = run(model.to(torch.bfloat16), batch, "a")
    assert half.dtype == torch.bfloat16
    assert {p.dtype for module in model._modules_of("a") for p in module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half.float(), single, rtol=0.1, atol=0.25)


@cases(MORE_METHODS, ("bert", "gpt2"))
def test_a_seed_makes_the_same_weights(name: str, method: str) -> None:
    model, states = adapted(name), []
    for adapter in ("a", "b"):
        torch.manual_seed(len(states))
        drawn = torch.rand(1)
        torch.manual_seed(len(states))
        model.add_adapter(adapter, changed(MORE_METHODS[method], init_weights_seed=7))
        assert torch.equal(torch.rand(1), drawn)
        states.append([value for module in model._modules_of(adapter) for value in module.state_dict().values()])
    assert states[0]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


# (IA)³ has no dropout
@cases([method for method, config in ALL.items() if config.get("composition_mode") != "scale"], COMPOSED)
def test_nothing_is_random_in_eval_mode(name: str, method: str) -> None:
    model, batch = fresh(name, method, dropout=0.5, init_weights_seed=7), inputs(name)
    certain = fresh(name, method, dropout=0.0, init_weights_seed=7)
    assert torch.equal(run(model, batch, "x"), run(certain, batch, "x"))


@cases([method for method in ALL if method in COUNTS or method in SHARED_COUNTS])
def test_the_number_of_parameters_is_the_stated_one(name: str, method: str) -> None:
    model = fresh(name, method)
    (config,) = model.adapters_config.members("x")
    sites = [site for site, _ in model.adapter_sites.holding("x")]
    stated = sum(COUNTS[method](config, site) for site in sites) if method in COUNTS else 0
    stated += SHARED_COUNTS[method](config, sites) if method in SHARED_COUNTS else 0
    assert model.adapter_summary(as_dict=True)[0]["#param"] == stated
    assert len({id(p) for module in model._modules_of("x") for p in module.parameters()}) > 0


@cases(MERGES)
def test_a_merged_adapter_acts_as_an_active_one_and_leaves_no_trace(name: str, method: str) -> None:
    model, batch = fresh(name, method), inputs(name)
    disturb(model, "x")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_active_adapters("x")
    wanted = output(model, batch)
    model.merge_adapter("x")
    merged = output(model, batch)
    close(merged, wanted)
    close(run(model, batch, None), wanted)
    assert not torch.equal(merged, base(name))
    model.merge_adapter("x")
    model.reset_adapter()
    assert torch.equal(output(model, batch), wanted)
    model.merge_adapter("x")
    model.set_active_adapters(None)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(output(model, batch), base(name))


@cases([method for method in ALL if method not in MERGES], COMPOSED)
def test_what_does_not_merge_is_refused(name: str, method: str) -> None:
    model = fresh(name, method)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="merge_adapter"):
        model.merge_adapter("x")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.adapter_sites.merged is None


@cases(ALL, COMPOSED)
def test_an_average_has_the_mean_of_the_weights(name: str, method: str) -> None:
    model = copy.deepcopy(pair(name, method))
    states = [
        {
            path.replace(f".{adapter}.", ".x."): value
            for path, value in model.state_dict().items()
            if f".{adapter}." in path
        }
        for adapter in ("a", "b")
    ]
    before = output(model, inputs(name))
    model.average_adapter("x", ["a", "a"], weights=[3, 1])
    close(run(model, inputs(name), "x"), run(model, inputs(name), "a"))
    if all(value.is_floating_point() or torch.equal(value, states[1][key]) for key, value in states[0].items()):
        model.average_adapter("x", {"a": 1, "b": 3}, overwrite_ok=True)
        for key, value in model.state_dict().items():
            if ".x." in key and value.is_floating_point():
                torch.testing.assert_close(value, states[0][key] / 4 + states[1][key] * 3 / 4)
    assert torch.equal(output(model, inputs(name)), before)


@each_composed
def test_rows_compose(name: str, method: str) -> None:
    """Parallel, BatchSplit, MultiTask and a setup for each row are separate runs."""
    model, batch = pair(name, method), inputs(name)
    parts = ["a", Stack("a", "lora"), None, Average("a", "b", weights=[0.3, 0.7])]
    alone = [run(model, batch, part) for part in parts]
    rows = torch.stack([alone[row][row] for row in range(len(parts))])
    close(run(model, batch, BatchSplit(*parts, batch_sizes=1)), rows)
    close(run(model, batch, Parallel(*parts)), torch.cat(alone))
    tasks = [2, 0, 1, 0]
    routed = torch.stack([alone[task][row] for row, task in enumerate(tasks)])
    close(run(model, batch, MultiTask(*parts), task_ids=torch.tensor(tasks)), routed)
    names = ["b", None, "a", "b"]
    routed = torch.stack([run(model, batch, part)[row] for row, part in enumerate(names)])
    close(run(model, batch, None, adapter_names=names), routed)


@each_composed
def test_the_average_of_equals_is_each(name: str, method: str) -> None:
    model, batch = pair(name, method), inputs(name)
    alone = run(model, batch, "a")
    close(run(model, batch, Average("a", "a", weights=[0.2, 0.8])), alone)
    close(run(model, batch, Average("a", "b", weights=[1, 0])), alone)
    close(run(model, batch, Average("a", None, weights=[0, 1])), base(name))


@each_composed
def test_a_stack_has_both(name: str, method: str) -> None:
    model, batch = pair(name, method), inputs(name)
    both = run(model, batch, Stack("a", "lora"))
    assert all((both - run(model, batch, part)).abs().max() > 1e-3 for part in ("a", "lora"))
    close(run(model, batch, Stack("a", None)), run(model, batch, "a"))


@cases([method for method in MORE_METHODS if method not in {*WITHOUT_CACHE_LAW, *PROMPTS}], COMPOSED)
def test_a_split_has_both(name: str, method: str) -> None:
    model, batch = pair(name, method), inputs(name)
    length = positions(name)
    close(run(model, batch, Split("a", "b", splits=[length, 0])), run(model, batch, "a"))
    assert (run(model, batch, Split("a", "b", splits=[2, length - 2])) - run(model, batch, "a")).abs().max() > 1e-3


@cases([method for method in MORE_METHODS if method not in WITHOUT_CACHE_LAW], ("llama",))
def test_generation_with_a_cache_is_that_without(name: str, method: str) -> None:
    model, batch = pair(name, method, head=True), inputs(name, rows=3, side="left")
    wanted = {"num_beams": 1, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True}
    for setup in ("a", BatchSplit("a", None, "b", batch_sizes=1)):
        with torch.no_grad(), adapters.AdapterSetup(setup):
            fast, slow = (
                model.generate(**batch, **wanted, use_cache=cache, return_dict_in_generate=True)
                for cache in (True, False)
            )
        assert torch.equal(fast.sequences, slow.sequences)
        for one, other in zip(fast.scores, slow.scores, strict=True):
            torch.testing.assert_close(one.nan_to_num(neginf=-1e9), other.nan_to_num(neginf=-1e9), rtol=1e-3, atol=1e-4)


@cases(MORE_METHODS, ("vit", "bart"))
def test_other_kinds_of_models(name: str, method: str) -> None:
    model, batch = pair(name, method), inputs(name)
    assert torch.equal(output(model, batch), base(name))
    alone = [run(model, batch, part) for part in ("a", None, Stack("b", "lora"))]
    assert (alone[0] - base(name)).abs().max() > 1e-3
    close(run(model, batch, Parallel("a", None, Stack("b", "lora"))), torch.cat(alone))
