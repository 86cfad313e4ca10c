"""The code of the README runs as it stands, and what it points to exists."""

import re
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: code.splitlines()[0])
def test_snippet(code, tmp_path, monkeypatch):
    """With a small model of the name that the snippet asks for."""
    monkeypatch.chdir(tmp_path)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    BertModel(config).save_pretrained("bert-base-uncased")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links(file):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / file).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets():
    """Every `make` command of the documents is a target."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {
        name
        for file in ROOT.glob("*.md")
        for name in re.findall(r"\bmake (\w+)(?= *(?:#|`|TEXT|ARGS))", file.read_text("utf-8"))
    }
    assert named and named <= targets
