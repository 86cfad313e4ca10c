"""``python -m benchmarks.training``: what `AdapterTrainer` adds to a bare loop, and the memory of a training step.

Memory is the peak resident set of a process of its own, less what it had before the model, on a BERT-base shape with 16
rows of 128 tokens: LoRA here, in PEFT, by hand; every method with and without gradient checkpointing. Writes the tables
to ``docs/benchmarks-training.md`` and the figure beside it.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from adapters import AdapterTrainer

from .__main__ import machine, table
from .by_hand import by_hand
from .models import BERT_BASE, METHODS, MINILM, TINY, Shape, adapted, inputs, training_step, with_peft

ROWS, LENGTH = 16, 128
OVERHEAD, MEMORY = 1.02, 1100
SHAPES = {shape.name: shape for shape in (BERT_BASE, MINILM, TINY)}
MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA": partial(adapted, method="LoRA"),
    "PEFT LoRA": partial(with_peft, method="LoRA"),
    "LoRA by hand": partial(by_hand, method="LoRA"),
    "bottleneck": partial(adapted, method="bottleneck"),
    "prefix": partial(adapted, method="prefix"),
}
CHECKPOINTED = tuple(METHODS)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="how often both loops run, in turn")
    parser.add_argument("--steps", type=int, default=10, help="of each loop")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the command out")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks-training.md"))
    parser.add_argument("--step", nargs=3, metavar=("MODEL", "SHAPE", "CHECKPOINTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if arguments.step:
        print(json.dumps(step_here(*arguments.step)))
        return
    loop, whole = (TINY, TINY) if arguments.tiny else (MINILM, BERT_BASE)
    parts = [HEADER.format(command=" ".join(["python -m benchmarks.training", *sys.argv[1:]]), machine=machine())]
    for part in (overhead(loop, arguments.steps, arguments.rounds), *memory(whole, arguments.output)):
        print(part, flush=True)
        parts.append(part)
    arguments.output.write_text("\n".join(parts), "utf-8")


class Clock(TrainerCallback):
    """The CPU seconds of a trainer's steps, from the beginning of the second to the end of the last."""

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first step makes the optimizer's state."""
        if state.global_step == 1:
            self.started = time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All is counted, what follows the last step too."""
        self.seconds = time.process_time() - self.started


class InOrder(AdapterTrainer):
    """Without shuffling, as the bare loop."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def with_trainer(model: nn.Module, rows: list[dict[str, Any]], steps: int, batch: int) -> float:
    """CPU seconds of `steps` steps by `AdapterTrainer`."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=steps + 1, per_device_train_batch_size=batch, use_cpu=True, disable_tqdm=True,
            report_to="none", save_strategy="no", logging_strategy="no", max_grad_norm=1.0, learning_rate=1e-4,
        )  # fmt: skip
        InOrder(model, options, train_dataset=rows, callbacks=[clock]).train()
    return clock.seconds


def with_loop(model: nn.Module, rows: list[dict[str, Any]], steps: int, batch: int) -> float:
    """CPU seconds of the same steps in a loop: batches, gradients clipped, AdamW, a linear schedule."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps + 1)
    batches = torch.utils.data.DataLoader(rows, batch, collate_fn=transformers.default_data_collator)
    model.train()
    started = 0.0
    for number, example in zip(range(steps + 1), batches, strict=False):
        if number == 1:
            started = time.process_time()
        model(**example).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.process_time() - started


def overhead(shape: Shape, steps: int, rounds: int) -> str:
    """The trainer's time as a ratio to the loop's, each the least of some rounds."""
    batch = 8
    example = inputs(shape, batch * (steps + 1), LENGTH)
    rows = [dict(zip(example, values, strict=True)) for values in zip(*example.values(), strict=True)]
    model = adapted(shape.build(), "LoRA")
    ways = {"bare loop": with_loop, "AdapterTrainer": with_trainer}
    times = {name: float("inf") for name in ways}
    for number in range(rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            times[name] = min(times[name], ways[name](model, rows, steps, batch) / steps)
    ratio = times["AdapterTrainer"] / times["bare loop"]
    verdict = "≤" if ratio <= OVERHEAD else "**missed**"
    lines = [("LoRA step, " + shape.name, "CPU ms", "ratio")]
    lines += [("bare loop", f"{times['bare loop'] * 1e3:.1f}", "1")]
    lines += [("AdapterTrainer", f"{times['AdapterTrainer'] * 1e3:.1f}", f"{ratio:.3f} ({verdict} {OVERHEAD})")]
    return f"## AdapterTrainer\n\n{table(lines)}"


def step_here(name: str, shape: str, checkpointing: str) -> dict[str, float]:
    """MB by which three training steps in this process lift its peak, with the model, and the CPU seconds of one."""
    before = resident()
    base = SHAPES[shape].build().requires_grad_(False)
    model: Any = MODELS[name](base)
    if checkpointing == "yes":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = training_step(model, inputs(SHAPES[shape], ROWS, LENGTH))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"MB": (peak - before) / 1e6, "process": peak / 1e6, "seconds": min(seconds)}


def resident() -> int:
    """The bytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def step_apart(name: str, shape: Shape, checkpointing: bool) -> dict[str, float]:
    """`step_here` in a new process."""
    given = name, shape.name, "yes" if checkpointing else "no"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--step", *given]
    measured: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return measured


def memory(shape: Shape, output: Path) -> tuple[str, str]:
    """Two tables: LoRA here and elsewhere; each method with and without gradient checkpointing, which is drawn too."""
    plain = {name: step_apart(name, shape, False) for name in MODELS}
    rows = [("one step", "process, MB", "model and step, MB")]
    for name in ("LoRA", "PEFT LoRA", "LoRA by hand"):
        whole = plain[name]["process"]
        verdict = f" ({'≤' if whole <= MEMORY else '**missed**'} {MEMORY})" if name == "LoRA" else ""
        rows.append((name, f"{whole:.0f}{verdict}", f"{plain[name]['MB']:.0f}"))
    title = f"{shape.name}, {ROWS} x {LENGTH}"
    saved = {name: step_apart(name, shape, True) for name in CHECKPOINTED}
    below = [("", "MB", "MB, checkpointing", "s", "s, checkpointing")]
    for name in CHECKPOINTED:
        cells = [f"{each[name]['MB']:.0f}" for each in (plain, saved)]
        below.append((name, *cells, *(f"{each[name]['seconds']:.2f}" for each in (plain, saved))))
    output.with_suffix(".svg").write_text(figure(plain, saved), "utf-8")
    return (
        f"## Memory of a training step: {title}\n\n{table(rows)}",
        f"## Gradient checkpointing: {title}\n\n![memory and time]({output.stem}.svg)\n\n{table(below)}",
    )


def figure(plain: dict[str, dict[str, float]], saved: dict[str, dict[str, float]]) -> str:
    """Bars of memory and of time, each without and with checkpointing, as SVG."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" width="640" height="230" font-family="Arial" font-size="12">']
    parts.append('<text x="20" y="222">dark: as it is; light: with gradient checkpointing</text>')
    for start, unit, digits in ((20, "MB", 0), (340, "seconds", 2)):
        most = max(each[name][unit] for each in (plain, saved) for name in CHECKPOINTED)
        parts.append(f'<text x="{start}" y="16" font-weight="bold">{unit} of a step</text>')
        for number, name in enumerate(CHECKPOINTED):
            top = 30 + 60 * number
            parts.append(f'<text x="{start}" y="{top + 10}">{name}</text>')
            for row, (each, color) in enumerate(((plain, "#2a6f97"), (saved, "#a9d6e5"))):
                y, width = top + 14 + 17 * row, 180 * each[name][unit] / most
                parts.append(f'<rect x="{start}" y="{y}" width="{width:.0f}" height="15" fill="{color}"/>')
                parts.append(f'<text x="{start + width + 5:.0f}" y="{y + 12}">{each[name][unit]:.{digits}f}</text>')
    return "\n".join([*parts, "</svg>", ""])


HEADER = """# What training costs

Written by `{command}`: {machine}.

One thread, random weights, float32. "LoRA by hand" is the formula written into BERT's own classes, with no library. A
memory is that of a process of its own, with {rows} rows of {length} tokens: the peak of its resident set after three
steps, and the same less what it had before the model was made.
""".replace("{rows}", str(ROWS)).replace("{length}", str(LENGTH))


if __name__ == "__main__":
    main()
