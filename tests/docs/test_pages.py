"""The snippets of the pages in docs/ run as they stand, one after the other, with no network."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, LlamaConfig, LlamaForCausalLM

from adapters import BertAdapterModel
from adapters.composition import ALLOWED_NESTINGS, Rows

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = {page.stem: page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the movie was a pleasure . man eats someone it rains"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A working directory with a tiny model and adapter under the names that the pages take from the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=32)
    BertForSequenceClassification(config).save_pretrained("bert-base-uncased")
    llama = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=32)
    LlamaForCausalLM(llama).save_pretrained("tiny-llama")
    Path("vocab.txt").write_text(WORDS.replace(" ", "\n"), "utf-8")
    BertTokenizer("vocab.txt").save_pretrained("bert-base-uncased")
    model = BertAdapterModel.from_pretrained("bert-base-uncased")
    model.add_adapter("sst-2")
    model.add_classification_head("sst-2", num_labels=2, id2label={0: "negative", 1: "positive"})
    model.save_adapter("AdapterHub/bert-base-uncased-pf-sst2", "sst-2")


def runs(page):
    """The names of a page after its snippets have run; those of PEFT run where it is installed."""
    names = {}
    for snippet in SNIPPET.finditer(PAGES[page]):
        if "from peft" in snippet[1] and find_spec("peft") is None:
            continue
        lines_before = PAGES[page].count("\n", 0, snippet.start(1))
        exec(compile("\n" * lines_before + snippet[1], str(ROOT / "docs" / f"{page}.md"), "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
@pytest.mark.parametrize(
    "page",
    [
        "any-architecture",
        "architecture",
        "checkpoints",
        "composition",
        "heads",
        "merging",
        "migrating",
        "quantised-training",
    ],
)
def test_the_snippets_of_a_page_run_in_order(page, offline):
    runs(page)


def test_every_page_with_snippets_runs():
    pages = {page for page, text in PAGES.items() if SNIPPET.search(text)}
    own = {"adding-a-method", "quickstart", "training"}  # tested by themselves
    assert pages - own == {
        "any-architecture",
        "architecture",
        "checkpoints",
        "composition",
        "heads",
        "merging",
        "migrating",
        "quantised-training",
    }


def test_the_table_of_nestings_is_the_one_that_is_checked():
    rows = re.findall(
        r"^\| `([^`]+)` \| (`.*`) \|$", PAGES["composition"].split("What may stand in what")[1], re.MULTILINE
    )
    written = {name: re.findall("`([^`]+)`", kinds) for name, kinds in rows}
    names = {kind: kind.__name__ for kind in ALLOWED_NESTINGS} | {Rows: "adapter_names=[…]"}
    allowed = {
        names[kind]: [inner.__name__ for inner in kinds if inner is not str] for kind, kinds in ALLOWED_NESTINGS.items()
    }
    assert written == allowed


def test_the_quickstart_does_what_it_says(offline):
    names = runs("quickstart")
    assert str(names["adapter_name"]) == "sst-2"
    assert sorted(names["again"].adapters_config) == ["news", "reviews"]
    assert not torch.equal(names["stacked"], names["plain"])
    assert json.loads(Path("my-adapter/adapter_config.json").read_text("utf-8"))["name"] == "sst-2"


def test_the_training_page_trains_and_loads(offline):
    names = runs("training")
    assert names["fresh"].active_head == "mrpc"
    trained = Path("out/mrpc")
    assert {"adapter_config.json", "head_config.json"} <= {file.name for file in trained.iterdir()}
    assert not list(Path("out").glob("*.safetensors"))


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", PAGES[page])
    for link in links:
        target, _, anchor = link.partition("#")
        path = ROOT / "docs" / target if target else ROOT / "docs" / f"{page}.md"
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_modules_that_the_architecture_names_exist():
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", PAGES["architecture"])
    assert len(named) > 15
    missing = [
        name
        for name in set(named)
        if not any((base / name).exists() for base in (ROOT, ROOT / "src/adapters", ROOT / "src/adapters/checkpoints"))
    ]
    assert missing == []
