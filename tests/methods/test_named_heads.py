"""What acts at the maps onto words of named heads: LoRA, and trained tokens where they are tied."""

import copy

import pytest
import torch
from tiny_models import CONFIGS, disturb, inputs

from adapters import AutoAdapterModel, LoRAConfig, TrainableTokensConfig
from adapters.composition import BatchSplit, MultiTask, Parallel
from adapters.errors import AdapterError

KINDS = {
    "lora": LoRAConfig(r=2, selfattn_lora=False, lm_head_lora=True),
    "tokens": TrainableTokensConfig(token_indices=[3, 5, 7]),
}
HEADS = {"bert": "masked_lm", "gpt2": "causal_lm", "bart": "seq2seq_lm"}


def build(name, kind, heads=("a", "b"), tied=True, before=True):
    """Adapters and heads a and b; `before`: the heads are there before the adapters."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.tie_word_embeddings = tied
    model = AutoAdapterModel.from_config(config)
    steps = [lambda: [getattr(model, f"add_{HEADS[name]}_head")(head) for head in heads]]
    steps.append(lambda: [model.add_adapter(adapter, KINDS[kind]) for adapter in ("a", "b")])
    for step in steps if before else reversed(steps):
        step()
    for adapter in ("a", "b"):
        disturb(model, adapter)
    return model.eval()


@torch.no_grad()
def logits(model, batch, adapters=None, head=None, **kwargs):
    model.set_active_adapters(adapters)
    return model(**batch, head=head, **kwargs).logits


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("before", [True, False])
def test_formula(name, kind, before):
    model, batch = build(name, kind, before=before), inputs(name)
    found = []
    output = model.heads["a"].get_output_embeddings()
    output.register_forward_hook(lambda module, args, out: found.append(args[0]))
    adapted = logits(model, batch, "a", "a")
    hidden = found[0]
    if kind == "lora":
        ((_, module),) = model.adapter_sites.holding("a")
        weight = output.weight + module.scale * module.lora_B @ module.lora_A
    else:
        weight = output.weight.clone()
        weight[[3, 5, 7]] += model.adapter_sites.shared("a")["shared_parameters.a"].delta
    expected = torch.nn.functional.linear(hidden, weight, output.bias)
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted, logits(model, batch, None, "a"), atol=1e-3)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(HEADS))
def test_each_head_with_its_rows(name, kind):
    model, batch = build(name, kind), inputs(name)
    alone = {(a, h): logits(model, batch, a, h) for a in ("a", "b", None) for h in ("a", "b")}

    def same(found, *rows):
        torch.testing.assert_close(found, torch.cat(rows), atol=1e-5, rtol=1e-5)

    both = logits(model, batch, Parallel("a", "b"), Parallel("a", "b"))
    same(both, alone["a", "a"], alone["b", "b"])
    crossed = logits(model, batch, Parallel("a", "b"), Parallel("b", "a"))
    same(crossed, alone["a", "b"], alone["b", "a"])
    sizes = {"batch_sizes": [1, 3]}
    split = logits(model, batch, BatchSplit("a", "b", **sizes), BatchSplit("a", "b", **sizes))
    same(split, alone["a", "a"][:1], alone["b", "b"][1:])
    other = logits(model, batch, BatchSplit("a", "b", batch_sizes=[3, 1]), BatchSplit("b", "a", **sizes))
    same(other, alone["a", "b"][:1], alone["a", "a"][1:3], alone["b", "a"][3:])
    tasks = logits(model, batch, MultiTask("a", "b"), "b", task_ids=torch.tensor([1, 0, 0, 1]))
    same(tasks, alone["b", "b"][:1], alone["a", "b"][1:3], alone["b", "b"][3:])
    model.set_active_adapters(None)
    rowwise = model(**batch, adapter_names=["b", "a", "b", "a"]).logits
    same(rowwise, alone["b", "b"][0:1], alone["b", "b"][2:3], alone["a", "a"][1:2], alone["a", "a"][3:4])
    same(logits(copy.deepcopy(model), batch, "a", "a"), alone["a", "a"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_saved_with_the_adapter(kind, tmp_path):
    model, batch = build("gpt2", kind), inputs("gpt2")
    expected = logits(model, batch, "a", "a")
    model.save_adapter(tmp_path / "one", "a")
    model.save_pretrained(tmp_path / "whole")
    whole = AutoAdapterModel.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole, batch, "a", "a"), expected)
    whole.delete_adapter("a")
    whole.delete_head("a")
    whole.load_adapter(tmp_path / "one")
    torch.testing.assert_close(logits(whole, batch, "a", "a"), expected)


def test_heads_come_and_go():
    model, batch = build("gpt2", "lora"), inputs("gpt2")
    expected = logits(model, batch, "a", "b")
    model.delete_head("a")
    torch.testing.assert_close(logits(model, batch, "a", "b"), expected)
    model.add_causal_lm_head("later")
    assert not torch.equal(logits(model, batch, "a", "later"), logits(model, batch, None, "later"))
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert not any(output._forward_hooks for head in model.heads.values() for output in head)
    model.resize_token_embeddings(60)
    model.add_adapter("a", KINDS["lora"])
    disturb(model, "a")
    changed = logits(model, batch, "a", "b")
    assert changed.shape[-1] == 60
    assert not torch.equal(changed, logits(model, batch, None, "b"))


def test_untied_tokens_stay():
    model, batch = build("gpt2", "tokens", tied=False), inputs("gpt2")
    batch = {**batch, "input_ids": torch.full_like(batch["input_ids"], 9)}
    assert torch.equal(logits(model, batch, "a", "a"), logits(model, batch, None, "a"))


def test_training_and_generation():
    model, batch = build("gpt2", "lora"), inputs("gpt2", side="left")
    model.train_adapter("a")
    model.set_active_adapters("a")
    model(**batch, head="a", labels=batch["input_ids"]).loss.backward()
    assert all(module.lora_B.grad.abs().sum() > 0 for _, module in model.adapter_sites.holding("a"))
    model.active_head = "a"
    model.eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **arguments), model.generate(**batch, **arguments, use_cache=False))


def test_merges():
    model, batch = build("gpt2", "tokens"), inputs("gpt2")
    expected = logits(model, batch, "a", "a")
    model.merge_adapter("a")
    torch.testing.assert_close(logits(model, batch, "a", "a"), expected, atol=1e-5, rtol=1e-5)
    model.reset_adapter()
    assert torch.equal(logits(model, batch, "a", "a"), expected)
    for tied, message in ((True, "one weight"), (False, "all named heads")):
        with pytest.raises(AdapterError, match=message):
            build("gpt2", "lora", tied=tied).merge_adapter("a")
