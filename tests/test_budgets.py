"""The size and order that docs/architecture.md promises, read from the source itself."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/adapters"
FILES = sorted(SOURCE.rglob("*.py"))
LINES = {file: file.read_text("utf-8").splitlines() for file in FILES}
TREES = {file: ast.parse(file.read_text("utf-8")) for file in FILES}
FILE_LINES, METHOD_LINES, FUNCTION_LINES = 400, 300, 40
# Lines of code of each part. Methods have none: each is a file that nobody has to know but its readers, and their
# number is to grow.
PART_LINES = {"": 7_500, "checkpoints": 3_250, "heads": 1_700, "configuration": 700, "training": 800}
EXCEPTIONS = {"model.py": 600}
# A part may import the parts before it. `import adapters` itself imports none: its names are resolved on first use.
ORDER = ["errors", "configuration", "signals", "composition", "context", "containers", "derived", "sharded"]
ORDER += [
    "grouping",
    "evaluation",
    "interfaces",
    "interface",
    "convolutions",
    "topology",
    "described",
    "samples",
    "quantised",
    "merging",
    "standing_in",
    "trace",
    "fused",
    "trails",
    "following",
    "survey",
    "sites",
    "layouts",
    "recorded",
    "stacks",
    "prompts",
    "positions",
    "sublayers",
    "streams",
    "vocabulary",
    "attention",
    "blocks",
    "norms",
    "method",
    "methods",
]
ORDER += ["configuration.resolve", "configuration.model_adapters_config"]
ORDER += [
    "reports",
    "repetition",
    "placement",
    "sitemap",
    "summary",
    "walking",
    "sharing",
    "mixing",
    "averaging",
    "combining",
    "bounds",
    "checkpoints",
    "saving",
    "loading",
    "invertible",
    "embeddings",
    "model",
    "wrap",
    "describing",
    "former_names",
    "heads",
    "exporting",
]
ORDER += ["auto", "models", "training", "trainer", "cli"]
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))


def docstrings(tree: ast.AST) -> set[int]:
    """The numbers of the lines that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [
        node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node) is not None
    ]
    return {number for first in firsts for number in range(first.lineno, first.end_lineno + 1)}


def code(file: Path) -> dict[int, str]:
    """The lines by number, without blank lines, comments and docstrings."""
    lines = {number: line.strip() for number, line in enumerate(LINES[file], 1)}
    written = docstrings(TREES[file])
    return {number: line for number, line in lines.items() if line and line[0] != "#" and number not in written}


def rank(module: str) -> int:
    """Where a module of the package stands in ORDER, by its own name or that of its part."""
    names = module.split(".")
    return max(ORDER.index(name) for name in (names[0], ".".join(names[:2])) if name in ORDER)


def imported(file: Path) -> set[str]:
    """The modules and names of the package that this module imports at its top level."""
    package = ["adapters", *file.relative_to(SOURCE).parent.parts]
    found: set[str] = set()
    for node in TREES[file].body:
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {name.removeprefix("adapters.") for name in found if name.startswith("adapters.")}
    return inside - {"__version__"}


@each_file
def test_file_is_short(file):
    assert len(LINES[file]) <= EXCEPTIONS.get(file.name, FILE_LINES)


@each_file
def test_functions_are_short(file):
    """Counted without the docstring, which may be long for a public function."""
    functions = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: node.end_lineno - node.lineno + 1 - len(docstrings(node)) for node in functions}
    assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}


@each_file
def test_names_and_notes(file):
    assert file.stem not in {"utils", "helpers", "common"}
    assert [line for line in LINES[file] if re.search(r"\b(TODO|FIXME|XXX)\b(?!.*#\d+)", line)] == []


@each_file
def test_imports_are_a_straight_line(file):
    own = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    highest = -1 if own == "__init__" else rank(own)
    assert {name for name in imported(file) if rank(name) > highest} == set()


@pytest.mark.parametrize("part", PART_LINES, ids=lambda part: part or "core")
def test_part_is_small(part):
    """Lines of code: docstrings, comments and blank lines are not what makes a package hard to hold in the head."""
    inside = [file for file in FILES if "/".join(file.relative_to(SOURCE).parts[:-1]).split("/")[0] == part]
    assert inside and sum(len(code(file)) for file in inside) < PART_LINES[part]


def test_each_part_has_a_budget():
    parts = {file.relative_to(SOURCE).parts[0] for file in FILES if len(file.relative_to(SOURCE).parts) > 1}
    assert parts - {"methods"} == PART_LINES.keys() - {""}


@pytest.mark.parametrize("file", sorted((SOURCE / "methods").glob("*.py")), ids=lambda file: file.stem)
def test_method_is_small(file):
    assert len(code(file)) <= METHOD_LINES


def test_little_is_written_twice(window=6):
    """Below 5 % of the lines of code, imports left out, stand in a run of six lines that is found elsewhere too."""
    skipped = re.compile(r"(from|import)\b|\W+$|[\w\", ]+,$")
    lines = {file: [line for line in code(file).values() if not skipped.match(line)] for file in FILES}
    runs = {file: list(zip(*(each[k:] for k in range(window)), strict=False)) for file, each in lines.items()}
    seen = Counter(run for each in runs.values() for run in each)
    starts = [(file, start) for file, each in runs.items() for start, run in enumerate(each) if seen[run] > 1]
    repeated = {(file, start + k) for file, start in starts for k in range(window)}
    assert len(repeated) < 0.05 * sum(map(len, lines.values())), Counter(file.name for file, _ in repeated)
