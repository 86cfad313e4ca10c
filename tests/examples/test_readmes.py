"""The commands of the examples' pages: each names a script that is there and options that it has."""

import re
import shlex
import sys
from pathlib import Path
from string import Template

import pytest
from example_runs import SCRIPTS, load_script

BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands in the page's bash blocks, with `export NAME=value` filled in; those with … are no whole ones."""
    found = []
    for block in BLOCK.findall(page.read_text("utf-8")):
        values: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                values[name] = value
            elif line.startswith("python ") and "…" not in line:
                found.append(shlex.split(Template(line).substitute(values)))
    return found


COMMANDS = [(page.parent, command) for page in sorted(SCRIPTS.glob("*/README.md")) for command in commands(page)]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL sets it by the old name
@pytest.mark.parametrize(
    ("folder", "command"), COMMANDS, ids=[f"{folder.name}-{number}" for number, (folder, _) in enumerate(COMMANDS)]
)
def test_a_command_is_understood(folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch):
    script = load_script(f"{folder.name}/{command[1]}")
    monkeypatch.setattr(sys, "argv", command[1:])
    parsed = script.parse_arguments()
    assert parsed


def test_each_script_has_a_page_and_requirements():
    folders = {path.parent for path in SCRIPTS.glob("*/*.py")}
    assert folders and all(
        (folder / name).is_file() for folder in folders for name in ("README.md", "requirements.txt")
    )
    for folder in folders:
        page = (folder / "README.md").read_text("utf-8")
        assert all(path.name in page for path in folder.glob("run_*.py"))
