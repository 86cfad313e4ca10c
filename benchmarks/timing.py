"""Measuring on a machine that does other things too: CPU time, of everything in turn, again and again."""

import gc
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each call; in every round each runs once, in a new order."""
    seconds = {name: float("inf") for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for call in calls.values():
        call()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name] = min(seconds[name], cpu_seconds(calls[name]))
    gc.enable()
    return seconds


def cpu_seconds(call: Callable[[], object]) -> float:
    """The CPU seconds of one call, of all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def import_seconds(statements: Mapping[str, str], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each import statement, each time in a new interpreter."""

    def run(statement: str) -> float:
        code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
        return float(subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1])

    times = [{name: run(statement) for name, statement in statements.items()} for _ in range(rounds)]
    return {name: min(each[name] for each in times) for name in statements}
