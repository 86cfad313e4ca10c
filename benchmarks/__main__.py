"""``python -m benchmarks``: what adapters cost, as ratios to the bare model, and next to PEFT.

Prints the tables and writes them to ``docs/benchmarks.md``.
"""

import argparse
import copy
import platform
import sys
from collections.abc import Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import nn

import adapters

from .by_hand import by_hand
from .methods import table_of_methods
from .models import (
    BERT_BASE,
    MINILM,
    TINY,
    TWO_LAYERS,
    Shape,
    adapted,
    forward,
    inactive,
    inputs,
    sharing,
    training_step,
    with_peft,
)
from .timing import cpu_seconds, import_seconds, interleaved

OURS, PEFTS, BY_HAND = ("LoRA", "bottleneck", "prefix"), ("LoRA", "prefix"), ("LoRA", "bottleneck")
LENGTH, ADAPTERS = 128, 200
TARGETS = {  # (measurement, row): the most that the ratio may be
    ("forward, batch 1", "inactive"): 1.01,
    ("forward, batch 8", "inactive"): 1.01,
    ("forward, batch 1", "LoRA"): 1.02,
    ("training step, batch 8", "LoRA"): 0.67,
    ("training step, batch 8", "bottleneck"): 0.60,
}
Row = tuple[str, ...]


def main() -> None:
    """Measure everything, report it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="how often all is timed (batch 1: four times that)")
    parser.add_argument("--shapes", nargs="*", choices=["MiniLM", "BERT-base"], help="only these (default: both)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command out")
    parser.add_argument(
        "--output", type=Path, help="the report (default: docs/benchmarks.md, or docs/benchmarks-methods.md)"
    )
    parser.add_argument("--methods", nargs="*", help="each method next to PEFT, and nothing else (default: all)")
    parser.add_argument("--reference", help="with --methods: the interpreter of an environment with adapters 1.3.0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    shapes = [TINY] if arguments.tiny else [
        shape for shape in (MINILM, BERT_BASE) if not arguments.shapes or shape.name in arguments.shapes
    ]  # fmt: skip
    by_methods = arguments.methods is not None
    output = arguments.output or Path("docs/benchmarks-methods.md" if by_methods else "docs/benchmarks.md")
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    parts: list[str] = [HEADER.format(command=command, machine=machine(), length=LENGTH)]
    parts += [] if by_methods else [VARIANTS_NOTE]
    measured = (
        by_method(TINY if arguments.tiny else TWO_LAYERS, arguments)
        if by_methods
        else measure(shapes, arguments.rounds)
    )
    for part in measured:
        print(part, flush=True)
        parts.append(part)
    output.write_text("\n".join(parts), "utf-8")
    print(f"Written to {output}")


def by_method(shape: Shape, arguments: argparse.Namespace) -> Iterator[str]:
    """One table of all methods."""
    rows = table_of_methods(shape, arguments.rounds, arguments.reference, arguments.methods)
    yield f"## Methods, {shape.name}, batch 8\n\n{METHODS_NOTE}\n{table([tuple(row) for row in rows])}"


def measure(shapes: list[Shape], rounds: int) -> Iterator[str]:
    """One table after the other."""
    for shape in shapes:
        base = shape.build()
        title = f"## {shape.name} shape: hidden {shape.hidden}, {shape.layers} layers\n"
        columns = {
            "forward, batch 1": forwards(base, shape, 1, 4 * rounds),
            "forward, batch 8": forwards(base, shape, 8, rounds),
            "training step, batch 8": training_steps(base, shape, 8, rounds),
        }
        yield f"{title}\n{ratios(columns)}"
    yield f"## Once per model, adapter or process\n\n{costs(shapes[-1], rounds)}"
    if TINY not in shapes:
        yield import_costs(rounds)


def forwards(base: nn.Module, shape: Shape, batch: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a forward pass by variant."""
    models = {"bare": base, "bare, again": base, "inactive": inactive(base)}
    models |= {method: adapted(base, method) for method in OURS}
    models |= {f"PEFT {method}": with_peft(base, method) for method in PEFTS}
    models |= {f"{method} by hand": by_hand(base, method) for method in BY_HAND}
    example = inputs(shape, batch, LENGTH)
    return interleaved({name: forward(model, example) for name, model in models.items()}, rounds)


def training_steps(base: nn.Module, shape: Shape, batch: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a training step by variant; the bare model is trained in full."""
    models = {method: adapted(base, method) for method in OURS}
    models |= {f"PEFT {method}": with_peft(base, method) for method in PEFTS}
    models |= {f"{method} by hand": by_hand(base, method) for method in BY_HAND}
    example = inputs(shape, batch, LENGTH)
    full = training_step(copy.deepcopy(base).requires_grad_(True), example)
    steps = {name: training_step(model, example) for name, model in models.items()}
    return interleaved({"bare": full, "bare, again": full, **steps}, rounds)


def ratios(columns: dict[str, dict[str, float]]) -> str:
    """Rows are variants; each cell is the ratio to the bare model, and the target that it has to meet."""
    rows: list[Row] = [("", *columns)]
    names = {name: None for seconds in columns.values() for name in seconds}
    for name in names:
        cells = []
        for column, seconds in columns.items():
            if name not in seconds:
                cells.append("")
            elif name == "bare":
                cells.append(f"{seconds[name] * 1e3:.1f} ms")
            else:
                cells.append(judged(seconds[name] / seconds["bare"], TARGETS.get((column, name))))
        rows.append((name, *cells))
    return table(rows)


def costs(shape: Shape, rounds: int) -> str:
    """What is paid once: for a model, for an adapter, for the process."""
    base = shape.build()
    init = min(cpu_seconds(partial(adapters.init, sharing(base))) for _ in range(rounds)) * 1e3
    model = sharing(base)
    adapters.init(model)
    adding = [cpu_seconds(partial(model.add_adapter, f"a{n}", config="lora")) * 1e3 for n in range(ADAPTERS)]
    return table(
        [
            ("", f"{shape.name} shape", "target"),
            ("`adapters.init`", f"{init:.1f} ms", "15 ms"),
            ("`add_adapter`, LoRA: median of the first 20", f"{median(adding[:20]):.2f} ms", "1.5 ms"),
            (f"… of the 20 up to the {ADAPTERS}th", f"{median(adding[-20:]):.2f} ms", "1.5 ms, as the first"),
            ("… the same modules in bare PyTorch", f"{median(bare_lora_modules(shape)):.2f} ms", ""),
        ]
    )


def bare_lora_modules(shape: Shape, times: int = 20) -> list[float]:
    """CPU milliseconds to build the parameters of a LoRA without any library: what the machine allows."""
    kept = []

    def build() -> None:
        for _ in range(2 * shape.layers):
            module = nn.Module()
            module.lora_A = nn.Parameter(torch.empty(8, shape.hidden))
            module.lora_B = nn.Parameter(torch.empty(shape.hidden, 8))
            nn.init.kaiming_uniform_(module.lora_A, a=5**0.5)
            nn.init.zeros_(module.lora_B)
            kept.append(module)

    return [cpu_seconds(build) * 1e3 for _ in range(times)]


def import_costs(rounds: int) -> str:
    """What importing the library adds to importing transformers."""
    models = "from transformers import AutoModel, PreTrainedModel"
    seconds = import_seconds(
        {
            "transformers": "import transformers",
            "adapters": "import transformers, adapters",
            "models": models,
            "init": f"{models}; from adapters import init",
        },
        min(rounds, 5),
    )
    lazy, eager = seconds["adapters"] - seconds["transformers"], seconds["init"] - seconds["models"]
    return table(
        [
            ("", "added", "target"),
            ("`import adapters` to `import transformers`", f"{lazy:.2f} s", "0.2 s"),
            ("`from adapters import init` to importing the base class of transformers' models", f"{eager:.2f} s", ""),
        ]
    )


def judged(ratio: float, target: float | None) -> str:
    """The ratio, with the target where there is one."""
    return f"{ratio:.3f}" if target is None else f"{ratio:.3f} ({'≤' if ratio <= target else '**missed**'} {target})"


def table(rows: list[Row]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:], ""])


def machine() -> str:
    """What was measured on what, and when."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} × {names[0]}" if names else platform.processor()
    python = platform.python_version()
    return f"{date.today()}, {processor}, Python {python}, {packages}, adapters {adapters.__version__}"


HEADER = """# Benchmarks

Written by `{command}`: {machine}.

One thread, random weights, float32, {length} tokens. In each round every variant runs once, in a new order, in one
process; the numbers are ratios of the least CPU times.
"""

VARIANTS_NOTE = """The bare model is there twice: how far "bare, again" is from 1 is the noise. A training step is
forward, backward and AdamW; "bare" is full fine-tuning there. "inactive" has one adapter of each method, none active.
LoRA has r = 8 on queries and values, the bottleneck adapter is `seq_bn`, prefixes have 30 tokens (reparametrised,
width 512), in PEFT too. PEFT has no bottleneck adapters. "by hand" is the formula written into BERT's own classes
(benchmarks/by_hand.py), with no library at all: what the formula itself costs on this machine.
"""

METHODS_NOTE = """Ratios to the frozen model with its head in training, in the same process: 1.3.0 runs in an
interpreter of its own with transformers 4. Sizes are the same in every library.
"""


if __name__ == "__main__":
    main()
