"""The demo, with a small random model and made-up articles in place of MiniLM and the BBC's."""

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel, BertTokenizer

SCRIPT = Path(__file__).parents[2] / "examples/demo/demo.py"
WORDS = {"sport": ["goal", "match", "team"], "business": ["bank", "market", "price"]}


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in an empty working directory, where a run takes seconds."""
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for name, value in {"TRAIN": 32, "VALIDATION": 8, "TEST": 8, "BATCH": 4, "SMOOTH": 2, "TOKENS": 8}.items():
        monkeypatch.setattr(module, name, value)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in WORDS.values() for word in words)]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained("model")
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained("model")
    monkeypatch.setattr(module, "minilm", lambda: tmp_path / "model")
    return module


@pytest.fixture
def articles(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the package of articles is."""
    for topic, words in WORDS.items():
        for number in range(24):
            file = tmp_path / "bbcnews/data" / topic / f"{number:03}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(" ".join(words[(number >> shift) % 3] for shift in range(6)) + f"\n\n{topic} {number}")
    monkeypatch.setattr(demo, "package", lambda name: tmp_path)
    return tmp_path / "bbcnews/data"


def run(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], typed: str = "") -> str:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    printed = io.StringIO()
    monkeypatch.setattr(demo, "Console", lambda **_: Console(file=printed, width=120, highlight=False))
    demo.main()
    return printed.getvalue()


def test_the_whole_run_and_a_later_one(demo: ModuleType, articles: Path, monkeypatch: pytest.MonkeyPatch):
    printed = run(demo, monkeypatch, ["goal team match"])
    for name in ("full fine-tuning", "seq_bn", "lora", "prefix_tuning"):
        assert name in printed
    assert "100.0%" in printed and "goal team match\n  seq_bn" in printed
    assert Path("demo-output/learning_curves.png").stat().st_size > 10_000
    for arguments, typed in ((["--classify", "bank market"], ""), (["--classify"], "bank market\n")):
        later = run(demo, monkeypatch, arguments, typed)
        assert "bank market\n  seq_bn" in later and later.count("%)") == 3


def test_articles_are_read_once_each(demo: ModuleType, articles: Path):
    (articles / "sport/twice.txt").write_bytes((articles / "sport/001.txt").read_bytes())
    (articles / "sport/latin.txt").write_bytes("goal \xa3 team".encode("latin-1"))
    found = demo.read_articles()
    assert len(found) == len(dict(found)) == 49
    assert ("goal £ team", "sport") in found
    assert found == demo.read_articles()


def test_without_adapters_or_text(demo: ModuleType, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match="make demo"):
        run(demo, monkeypatch, ["--classify", "goal"])
    with pytest.raises(SystemExit, match="Nothing to classify"):
        run(demo, monkeypatch, ["--classify"])


def test_a_missing_package_is_named(demo: ModuleType):
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        demo.package("no_such_package")
