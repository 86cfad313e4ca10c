"""``python -m benchmarks.checkpoints``: loading LoRA adapters next to PEFT, and the memory that they take.

A BERT-base shape, rank 8 at query and value; CPU milliseconds of one thread, the least of some rounds. Prints a table.
"""

import argparse
import gc
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertModel

import adapters

from .models import BERT_BASE, TINY, Shape
from .timing import cpu_seconds

COUNTS, HELD = (1, 50), 200


def bare(shape: Shape) -> BertModel:
    """The encoder without a head."""
    return shape.build().bert


def ours(shape: Shape, folder: Path) -> Callable[[range], None]:
    """What loads a number of adapters into a model of ours."""
    model = bare(shape)
    adapters.init(model)
    model.add_adapter("saved", config="lora[r=8]")
    model.save_adapter(folder, "saved")
    model.delete_adapter("saved")

    def load(numbers: range) -> None:
        for number in numbers:
            model.load_adapter(folder, load_as=f"a{number}")

    return load


def pefts(shape: Shape, folder: Path) -> Callable[[range], None]:
    """What loads a number of adapters into a model of PEFT."""
    import peft  # which a plain installation does not have

    config = peft.LoraConfig(r=8, target_modules=["query", "value"])
    peft.get_peft_model(bare(shape), config, adapter_name="saved").save_pretrained(folder)
    model = peft.get_peft_model(bare(shape), config, adapter_name="first")

    def load(numbers: range) -> None:
        for number in numbers:
            model.load_adapter(folder / "saved", adapter_name=f"a{number}")

    return load


def milliseconds(
    make: Callable[[Shape, Path], Callable[[range], None]], shape: Shape, count: int, rounds: int
) -> float:
    """The least of some rounds, each into a new model into which one adapter was loaded before."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load = make(shape, Path(folder))
            load(range(1))
            seconds.append(cpu_seconds(lambda load=load: load(range(1, count + 1))))
        gc.collect()
    return 1000 * min(seconds)


def held(shape: Shape) -> float:
    """The bytes that many loaded adapters hold in all, as a multiple of those of their parameters."""
    with tempfile.TemporaryDirectory() as folder:
        load = ours(shape, Path(folder))
        gc.collect()
        before = storages()
        load(range(HELD))
        gc.collect()
        after = storages()
        file = Path(folder) / "adapter.safetensors"
        raw = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    return (sum(after.values()) - sum(before.values())) / (HELD * raw)


def storages() -> dict[int, int]:
    """The bytes of every tensor's memory that Python can reach, by address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the command out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    shape = TINY if arguments.tiny else BERT_BASE
    print(f"| loading, {shape.name} | " + " | ".join(f"{count} LoRA, ms" for count in COUNTS) + " |\n|---|---|---|")
    for name, make in {"adapters": ours, "PEFT": pefts}.items():
        times = [milliseconds(make, shape, count, arguments.rounds) for count in COUNTS]
        print(f"| {name} | " + " | ".join(f"{time:.1f}" for time in times) + " |", flush=True)
    print(f"\nMemory of {HELD} loaded LoRAs: {held(shape):.3f} of their raw size.")


if __name__ == "__main__":
    main()
