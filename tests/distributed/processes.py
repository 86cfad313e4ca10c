"""Two processes on this machine that talk by gloo, started from the test's own process, which has imported all."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PROCESSES = 2


def together(work: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
    """What `work(rank, *arguments)` gives in each of the processes; they are killed if they hang.

    Raises:
        AssertionError: A process failed, with what it said, or did not end in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_run, args=(rank, folder, work, arguments)) for rank in range(PROCESSES)]
        for child in children:
            child.start()
        end = time.monotonic() + seconds
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
        late = [child for child in children if child.is_alive()]
        for child in late:
            child.kill()
            child.join()
        failures = "\n".join(file.read_text("utf-8") for file in sorted(Path(folder).glob("failure-*")))
        assert not failures and not late, failures or f"{len(late)} of {PROCESSES} processes hung for {seconds} s"
        return [torch.load(f"{folder}/result-{rank}", weights_only=False) for rank in range(PROCESSES)]


def _run(rank: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ |= {name: str(value) for name, value in known.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
        torch.save(work(rank, *arguments), f"{folder}/result-{rank}")
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(f"process {rank}: {traceback.format_exc()}", "utf-8")
    finally:
        os._exit(0)  # none of what pytest does at the end of its own process
