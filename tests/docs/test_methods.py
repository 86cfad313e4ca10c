"""The pages of docs/methods/ say what the code says, and docs/adding-a-method.md works as it stands."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from tiny_models import adapted, disturb, inputs, output, rows_of, run

from adapters import AdapterConfig, AdapterError, Average, BatchSplit, ConfigUnion, Parallel, Stack
from adapters.configuration import registry
from adapters.method import METHODS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "methods").glob("*.md"))
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """The names of docs/adding-a-method.md after its snippets have run; its method is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    known = [(table, dict(table)) for table in (METHODS, registry.ARCHITECTURES, registry.ADAPTER_CONFIG_MAP)]
    names: dict = {"__name__": "walk"}
    for snippet in SNIPPET.findall((DOCS / "adding-a-method.md").read_text("utf-8")):
        exec(compile(snippet, "adding-a-method.md", "exec"), names)
    yield names
    for table, before in known:
        table.clear()
        table.update(before)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_the_walk_does_what_it_says(walk):
    model = walk["model"]
    assert walk["composed"].shape == (3, 4, 16)
    assert set(model.adapters_config) == {"scaled", "both", "task", "again"}
    rows = {row["name"]: row["#param"] for row in model.adapter_summary(as_dict=True)}
    assert rows["scaled"] == 2 * (2 * 2 * 16 + 2 * 24)
    assert [row["architecture"] for row in model.adapter_summary(as_dict=True)[:2]] == ["ssf", "union"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_method_that_a_user_defines_works_everywhere(name, walk, tmp_path):
    model, batch = adapted(name, "seq_bn", "lora"), inputs(name)
    base = output(model, batch)
    config = walk["SSFConfig"](attn_matrices=["q", "k", "v", "o"], output_lora=True)
    for adapter, made in {
        "a": config,
        "b": ConfigUnion(config.replace(leave_out=[0]), AdapterConfig.load("par_bn")),
    }.items():
        model.add_adapter(adapter, made)
        assert torch.equal(run(model, batch, adapter), base)
        disturb(model, adapter)
    parts = ["a", Stack("seq_bn", "b"), None, Average("a", "lora")]
    alone = [run(model, batch, part) for part in parts]
    close(run(model, batch, BatchSplit(*parts, batch_sizes=1)), torch.stack([alone[row][row] for row in range(4)]))
    close(run(model, rows_of(batch, slice(0, 2)), Parallel(*parts)), torch.cat([one[:2] for one in alone]))
    for adapter in ("a", "b"):
        model.save_adapter(tmp_path / adapter, adapter)
        model.load_adapter(tmp_path / adapter, load_as=f"{adapter}_again")
        assert torch.equal(run(model, batch, f"{adapter}_again"), run(model, batch, adapter))
    other = copy.deepcopy(model)
    if name in ("llama", "t5"):
        with pytest.raises(AdapterError, match="without a bias"):
            other.merge_adapter("a")
    else:
        other.merge_adapter("a")
        close(output(other, batch), alone[0])
    model.delete_adapter("a")
    assert torch.equal(output(model, batch), base)


def test_what_is_generated_is_up_to_date():
    generated = runpy.run_path(str(DOCS / "generate.py"))["generated"]()
    stale = [path.name for path, text in generated.items() if not path.exists() or path.read_text("utf-8") != text]
    assert stale == [], "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
