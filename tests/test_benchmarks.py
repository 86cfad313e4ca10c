"""The benchmark's command runs and reports, on shapes so small that its numbers mean nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_benchmarks_report_every_measurement(tmp_path):
    pytest.importorskip("peft")
    report = tmp_path / "benchmarks.md"
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--rounds=1", f"--output={report}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    written = report.read_text("utf-8")
    for row in (
        "inactive",
        "LoRA",
        "bottleneck",
        "prefix",
        "PEFT LoRA",
        "PEFT prefix",
        "LoRA by hand",
        "bottleneck by hand",
        "`adapters.init`",
    ):
        assert f"| {row} " in written
        assert f"| {row} " in printed


def test_methods_are_compared_with_peft(tmp_path):
    pytest.importorskip("peft")
    report = tmp_path / "methods.md"
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--rounds=1", f"--output={report}", "--methods"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "LoRA", "bottleneck"], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = [line.split("|") for line in report.read_text("utf-8").splitlines() if line.startswith(("| LoRA", "| bott"))]
    assert [[bool(cell.strip()) for cell in row[2:5]] for row in rows] == [[True, True, False], [True, False, False]]


def test_loading_is_compared_with_peft():
    pytest.importorskip("peft")
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--tiny", "--rounds=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:4]] == ["| adapters", "| PEFT"]
    assert float(printed.split("loaded LoRAs: ")[1].split()[0]) <= 1.05


def test_what_training_costs_is_measured():
    """Both loops and a step in a process of its own; the command itself starts eight."""
    code = """
import torch
from benchmarks.training import CHECKPOINTED, figure, overhead, step_here
from benchmarks.models import TINY
torch.set_num_threads(1)
print(overhead(TINY, 2, 1))
step = step_here("LoRA", "tiny", "yes")
assert 0 < step["MB"] < step["process"] and step["seconds"] > 0
assert figure(*[{name: step for name in CHECKPOINTED}] * 2).count("<rect") == 12
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    assert [line.split(" | ")[0].strip("| ") for line in printed.splitlines() if line.startswith("| ")][1:] == [
        "bare loop",
        "AdapterTrainer",
    ]
