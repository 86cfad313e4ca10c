"""Runs every method on every type of model and writes what it saw to docs/architectures.md.

python tests/architectures/matrix.py [--types bert vit] [--methods lora] [--checks 4] [--output FILE.md or FILE.json]

What was found is kept for each type under ``.matrix/``, by a digest of the code that it depends on: a run that was
stopped goes on where it was.
"""

import argparse
import hashlib
import json
import re
import signal
import sys
import time
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
MARKS = {"works": "✓", "refused": "–", "fails": "✗", "no meaning": "·"}
ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".matrix"
TESTS = ("cells", "inputs", "meaning", "models", "overrides", "shrinking")
Row = dict[str, tuple[str, str]]


def digest() -> str:
    """Of all code that a row depends on."""
    files = [
        *sorted((ROOT / "src/adapters").rglob("*.py")),
        *(Path(__file__).with_name(f"{name}.py") for name in TESTS),
    ]
    whole = hashlib.sha256(f"{transformers.__version__} {torch.__version__}".encode())
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def run(job: tuple[str, tuple[str, ...], int, Path]) -> tuple[str, Row]:
    """The row of a type, or why there is none under ""; what is known of it already is not run again."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model_type, methods, checks, folder = job
    file = folder / f"{model_type}-{checks}.json"
    known: Row = json.loads(file.read_text("utf-8")) if file.exists() else {}
    missing = tuple(method for method in methods if method not in known)
    if missing and "" not in known:
        known |= _tried(model_type, missing, checks)
        file.write_text(json.dumps(known), "utf-8")
    return model_type, known if "" in known else {method: known[method] for method in methods}


def _tried(model_type: str, methods: tuple[str, ...], checks: int) -> Row:
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return run_type(model_type, methods, checks)
    except (Exception, SystemExit) as error:
        return {"": ("not built", f"{type(error).__name__}: {error}")}
    finally:
        signal.alarm(0)


def stop(*_: Any) -> None:
    """The time of a type is up."""
    raise TimeoutError(f"not done after {SECONDS} s")


def rows(types: Iterable[str], methods: tuple[str, ...], checks: int, processes: int) -> dict[str, Row]:
    """The rows of all types, by as many processes, each of which is replaced now and then."""
    folder = KEPT / digest()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(model_type, methods, checks, folder) for model_type in types]
    found, start = {}, time.perf_counter()
    with get_context("fork").Pool(processes, maxtasksperchild=25) as pool:
        for done, (model_type, row) in enumerate(pool.imap_unordered(run, jobs), 1):
            found[model_type] = row
            seconds = time.perf_counter() - start
            print(f"{done}/{len(jobs)} in {seconds:.0f} s {model_type:<40}", end="\r", file=sys.stderr)
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


def _left_out(checks: Counter[str]) -> list[str]:
    if not checks:
        return []
    listed = ", ".join(f"`{name}` in {count} cells" for name, count in checks.most_common())
    return [
        "Left out, since the bare model does not do by itself what the check asks for (no checkpointing, no texts,",
        f"rows that are not apart): {listed}.",
    ]


def page(found: dict[str, Row], checks: int, note: str) -> str:
    """docs/architectures.md."""
    built = {model_type: row for model_type, row in found.items() if "" not in row}
    methods = [method for method in METHODS if any(method in row for row in built.values())]
    counts = {method: counted(built)[method] for method in methods}
    seen = [cell for row in built.values() for cell in row.values()]
    reasons = Counter((kind, general(why)) for kind, why in seen if kind != "works")
    numbers = {reason: number for number, (reason, _) in enumerate(reasons.most_common(), 1)}
    every = sum(counts.values(), Counter())
    meant = Counter({kind: every[kind] for kind in ("works", "fails", "refused")})
    done = ", ".join(f"`{check.__name__}`" for check in CHECKS[:checks])
    left_out = Counter(name for kind, why in seen if kind == "works" for name in why.split())
    lines = [
        "# Which method works on which architecture",
        "",
        f"Written by `make matrix` (tests/architectures/matrix.py) from tiny random models of {len(found)} of",
        f"the {len(CONFIG_MAPPING_NAMES)} types in transformers' config mapping; {len(built)} were built and run.",
        f"Each method went through the checks {done} of",
        "tests/architectures/cells.py. ✓: all of them hold. –: the method is refused by an `AdapterError` that says",
        "why. ✗: a check fails. ·: the method has no meaning on the model, as tests/architectures/meaning.py reads off",
        "one pass of the bare model, and is refused. The number is that of the reason. Types that are not listed were",
        "not run.",
        note,
        "",
        f"Of {every.total()} cells {every['no meaning']} have no meaning. Of the {meant.total()} others",
        f"{every['works']} work (**{share(meant, 'works')}**), {every['refused']} are refused and",
        f"{every['fails']} fail.",
        *_left_out(left_out),
        "",
        "| method | works | of those with a meaning | refused | fails | no meaning |",
        "|---|---|---|---|---|---|",
        *(
            f"| {method} | {own['works']} | {share(own - Counter({'no meaning': own['no meaning']}), 'works')} "
            f"| {own['refused']} | {own['fails']} | {own['no meaning']} |"
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
