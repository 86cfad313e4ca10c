"""Runs every method on every type of model and writes what it saw to docs/architectures.md.

python tests/architectures/matrix.py [--types bert vit] [--methods lora] [--checks 4] [--output FILE.md or FILE.json]
"""

import argparse
import json
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import CHECKS, METHODS, run_type
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import adapters.wrap  # noqa: F401  # before the processes are forked, so that all have the same code

SECONDS = 180
MARKS = {"works": "✓", "refused": "–", "fails": "✗"}
Row = dict[str, tuple[str, str]]


def run(job: tuple[str, tuple[str, ...], int]) -> tuple[str, Row]:
    """The row of a type, or why there is none under ""."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    model_type, methods, checks = job
    try:
        return model_type, run_type(model_type, methods, checks)
    except (Exception, SystemExit) as error:
        return model_type, {"": ("not built", f"{type(error).__name__}: {error}")}
    finally:
        signal.alarm(0)


def stop(*_: Any) -> None:
    """The time of a type is up."""
    raise TimeoutError(f"not done after {SECONDS} s")


def rows(types: Iterable[str], methods: tuple[str, ...], checks: int, processes: int) -> dict[str, Row]:
    """The rows of all types, by as many processes, each of which is replaced now and then."""
    jobs = [(model_type, methods, checks) for model_type in types]
    found = {}
    with get_context("fork").Pool(processes, maxtasksperchild=25) as pool:
        for done, (model_type, row) in enumerate(pool.imap_unordered(run, jobs), 1):
            found[model_type] = row
            print(f"{done}/{len(jobs)} {model_type:<40}", end="\r", file=sys.stderr)
    return dict(sorted(found.items()))


def counted(found: dict[str, Row]) -> dict[str, Counter[str]]:
    """For each method how often it works, is refused and fails."""
    return {method: Counter(row[method][0] for row in found.values() if method in row) for method in METHODS}


def share(counts: Counter[str], *kinds: str) -> str:
    """The share of these kinds of cells in all."""
    return f"{100 * sum(counts[kind] for kind in kinds) / max(1, counts.total()):.1f} %"


def general(reason: str) -> str:
    """A reason without what is of one model only, so that equal ones are counted together."""
    reason = re.sub(r"\b[A-Z]\w*(Model|Encoder|Decoder|Transformer|Backbone)\w*\b", "the model", reason.split("\n")[0])
    return re.sub(r"\d+", "N", reason).replace("|", "/")[:300]


def page(found: dict[str, Row], checks: int, note: str) -> str:
    """docs/architectures.md."""
    built = {model_type: row for model_type, row in found.items() if "" not in row}
    methods = [method for method in METHODS if any(method in row for row in built.values())]
    counts = {method: counted(built)[method] for method in methods}
    seen = [cell for row in built.values() for cell in row.values()]
    reasons = Counter((kind, general(why)) for kind, why in seen if kind != "works")
    numbers = {reason: number for number, (reason, _) in enumerate(reasons.most_common(), 1)}
    every = sum(counts.values(), Counter())
    meant = Counter({kind: every[kind] for kind in ("works", "fails")})
    done = ", ".join(f"`{check.__name__}`" for check in CHECKS[:checks])
    lines = [
        "# Which method works on which architecture",
        "",
        f"Written by `make matrix` (tests/architectures/matrix.py) from tiny random models of {len(found)} of",
        f"the {len(CONFIG_MAPPING_NAMES)} types in transformers' config mapping; {len(built)} were built and run.",
        f"Each method went through the checks {done} of",
        "tests/architectures/cells.py. ✓: all of them hold. –: the method is refused by an `AdapterError` that says",
        "why. ✗: a check fails. The number is that of the reason. Types that are not listed were not run.",
        note,
        "",
        f"Of {every.total()} cells {every['works']} work ({share(every, 'works')}), {every['refused']} are refused and",
        f"{every['fails']} fail; of those that are not refused {share(meant, 'works')} work.",
        "",
        "| method | works | refused | fails |",
        "|---|---|---|---|",
        *(
            f"| {method} | {own['works']} ({share(own, 'works')}) | {own['refused']} | {own['fails']} |"
            for method, own in counts.items()
        ),
        "",
        f"| type | {' | '.join(methods)} |",
        f"|---|{'---|' * len(methods)}",
    ]
    for model_type, row in built.items():
        cells = (
            MARKS[kind] if kind == "works" else f"{MARKS[kind]} {numbers[kind, general(why)]}"
            for kind, why in map(row.get, methods)
        )
        lines.append(f"| {model_type} | {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. ({kind}, {reasons[kind, why]} cells) {why}" for (kind, why), number in numbers.items()]
    lines += ["", "## Not run", ""]
    lines += [f"- {model_type}: {general(row[''][1])}" for model_type, row in found.items() if "" in row]
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", nargs="*", default=list(CONFIG_MAPPING_NAMES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--checks", type=int, default=len(CHECKS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, nargs="*", default=[])
    parser.add_argument("--note", default="", help="how the types were chosen")
    parser.add_argument("--input", type=Path, help="a JSON of a former run, to be written as a page")
    arguments = parser.parse_args()
    found = (
        json.loads(arguments.input.read_text("utf-8"))
        if arguments.input
        else rows(arguments.types, tuple(arguments.methods), arguments.checks, arguments.processes)
    )
    for method, counts in counted(found).items():
        print(method, dict(counts))
    for output in arguments.output:
        text = (
            json.dumps(found, indent=1) if output.suffix == ".json" else page(found, arguments.checks, arguments.note)
        )
        output.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
