"""A process is killed in mid-run; started anew, the training ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import together
from safetensors.torch import load_file
from train_and_die import run

HERE = Path(__file__).parent


def in_process(rank: int, folder: Path, how: str, dies: bool) -> None:
    run(folder, how, dies)


def by_torchrun(folder: Path, how: str) -> None:
    """As a user starts it; the launcher ends the other process when one is killed."""
    paths = [HERE.parents[1] / "src", HERE, HERE.parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(HERE / "train_and_die.py"), str(folder), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_killed_worker_changes_no_result(how: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    together(in_process, whole, how, False, seconds=120)
    if how == "ddp":
        by_torchrun(killed, how)
    else:
        with pytest.raises(AssertionError, match="process 0"):
            together(in_process, killed, how, True, seconds=120)
    assert not (killed / "task").exists() and (killed / "checkpoint-2").exists()
    together(in_process, killed, how, True, seconds=120)
    assert (killed / "started-from.txt").read_text() == str(killed / "checkpoint-2")
    expected, found = (load_file(folder / "task/adapter.safetensors") for folder in (whole, killed))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    check_sizes(whole / "checkpoint-4")


def check_sizes(checkpoint: Path) -> None:
    """No weights of the base model: the adapter, its two moments, and what Trainer notes of itself."""
    adapter = (checkpoint / "task/adapter.safetensors").stat().st_size
    files = {file: file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    assert not [file for file in files if "model_fsdp" in str(file)]
    assert sum(files.values()) < 3 * adapter + 100_000, files
