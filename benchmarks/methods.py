"""Every method's forward pass and training step, next to PEFT's and to adapters 1.3.0's.

``python -m benchmarks.methods`` prints the seconds of the installed adapters as JSON; it runs under 1.3.0 too, by which
``--reference`` measures it in an interpreter of its own.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adapters

from .models import TINY, TWO_LAYERS, Shape, forward, inputs, sharing, training_step
from .timing import interleaved

LENGTH, BATCH = 128, 8
PLACES = ["query", "value"]
FORWARD, TRAINING = "forward", "training step"
Seconds = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Method:
    """The same method in each library.

    ours: the config string; old: that of 1.3.0, None if it has none; peft: the name of PEFT's configuration, "" if it
    has none; fields: those of PEFT's.
    """

    ours: str
    old: str | None = None
    peft: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def both(text: str, peft: str = "", **fields: Any) -> Method:
    """A method that 1.3.0 has under the same string."""
    return Method(text, text, peft, fields)


def linear(text: str, peft: str, **fields: Any) -> Method:
    """A method at queries and values that 1.3.0 lacks."""
    return Method(text, None, peft, {"target_modules": PLACES, **fields})


AT = {"target_modules": PLACES}
METHODS = {
    "LoRA": both("lora[r=8]", "LoraConfig", r=8, lora_alpha=8, **AT),
    "DoRA": both("dora[r=8]", "LoraConfig", r=8, lora_alpha=8, use_dora=True, **AT),
    "VeRA": both("vera[r=8]", "VeraConfig", r=8, **AT),
    "DvoRA": both("dvora[r=8]"),
    "(IA)³": both("ia3", "IA3Config", target_modules=["key", "value", "intermediate.dense"], feedforward_modules=[]),
    "MTL-LoRA": both("mtl_lora[r=8]"),
    "AdaLoRA": linear("adalora", "AdaLoraConfig", init_r=12, target_r=8, lora_alpha=8, total_step=1000),
    "LoHa": linear("loha[r=8]", "LoHaConfig", r=8, alpha=8),
    "LoKr": linear("lokr[r=8]", "LoKrConfig", r=8, alpha=8),
    "OFT": linear("oft[block_size=32]", "OFTConfig", oft_block_size=32),
    "BOFT": linear("boft[block_size=4]", "BOFTConfig", boft_block_size=4),
    "HRA": linear("hra[r=8]", "HRAConfig", r=8),
    "FourierFT": linear("fourierft[n_frequency=1000]", "FourierFTConfig", n_frequency=1000),
    "MiSS": linear("miss[r=32]", "MissConfig", r=32),
    "RoAd": linear("road[group_size=32]", "RoadConfig", group_size=32),
    "VB-LoRA": linear(
        "vblora[r=4,num_vectors=256,vector_length=32]", "VBLoRAConfig", r=4, num_vectors=256, vector_length=32
    ),
    "RandLoRA": linear("randlora[r=32]", "RandLoraConfig", r=32),
    "SHiRA": linear("shira[r=8]", "ShiraConfig", r=8),
    "HiRA": linear("hira[r=8]", "HiraConfig", r=8),
    "LN tuning": Method("ln_tuning", None, "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "BitFit": Method("bitfit"),
    "trainable tokens": Method(
        "trainable_tokens[token_indices=[1,2,3,4]]",
        None,
        "TrainableTokensConfig",
        {"token_indices": [1, 2, 3, 4], "target_modules": ["word_embeddings"]},
    ),
    "bottleneck": both("seq_bn"),
    "double bottleneck": both("double_seq_bn"),
    "parallel bottleneck": both("par_bn"),
    "Compacter++": both("compacter++[reduction_factor=8]"),
    "invertible": both("seq_bn_inv"),
    "prefix tuning": both(
        "prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512
    ),
    "prompt tuning": both("prompt_tuning", "PromptTuningConfig", num_virtual_tokens=10),
    "P-tuning": Method("p_tuning", None, "PromptEncoderConfig", {"num_virtual_tokens": 20}),
    "LoReFT": both("loreft"),
    "DiReFT": both("direft"),
    "MAM": both("mam"),
    "UniPELT": both("unipelt"),
}


def measured(models: dict[str, Callable[[Any], nn.Module]], shape: Shape, rounds: int) -> Seconds:
    """CPU seconds by measurement and variant; each variant gets a copy of the modules on the same weights."""
    base = shape.build()
    example = inputs(shape, BATCH, LENGTH)
    made = {name: build(with_own_head(base)) for name, build in models.items()}
    return {
        FORWARD: interleaved({name: forward(model, example) for name, model in made.items()}, rounds),
        TRAINING: interleaved({name: training_step(model, example) for name, model in made.items()}, rounds),
    }


def with_own_head(base: nn.Module) -> Any:
    """The base on the same weights, with a head of its own to train."""
    model: Any = sharing(base)
    model.classifier = copy.deepcopy(model.classifier).requires_grad_(True)
    return model


def frozen(model: Any) -> nn.Module:
    """The bare model with its head to train: what any method costs at least."""
    model.base_model.requires_grad_(False)
    return model


def adapted(text: str) -> Callable[[Any], nn.Module]:
    """A model with an active adapter of the installed adapters."""

    def build(model: Any) -> nn.Module:
        adapters.init(model)
        model.add_adapter("task", config=text)
        model.train_adapter("task")
        return model

    return build


def with_peft(method: Method) -> Callable[[Any], nn.Module]:
    """The same in PEFT."""

    def build(model: Any) -> nn.Module:
        import peft

        return peft.get_peft_model(model, getattr(peft, method.peft)(task_type="SEQ_CLS", **method.fields))

    return build


def table_of_methods(shape: Shape, rounds: int, reference: str | None, names: list[str] | None) -> list[list[str]]:
    """A row for each method: its cost in each library, as the ratio to the frozen model in the same process."""
    chosen = {name: method for name, method in METHODS.items() if not names or name in names}
    old = ask(reference, shape, rounds, [name for name, method in chosen.items() if method.old]) if reference else {}
    rows = [
        ["", *(f"{measure}: {library}" for measure in (FORWARD, TRAINING) for library in ("here", "PEFT", "1.3.0"))]
    ]
    for name, method in chosen.items():
        models = {"bare": frozen, "here": adapted(method.ours)}
        models |= {"PEFT": with_peft(method)} if method.peft else {}
        here = measured(models, shape, rounds)
        row = [name]
        for measure in (FORWARD, TRAINING):
            seconds = here[measure]
            found = {library: seconds[library] / seconds["bare"] for library in ("here", "PEFT") if library in seconds}
            if name in old:
                found["1.3.0"] = old[name][measure]
            row += [f"{found[library]:.3f}" if library in found else "" for library in ("here", "PEFT", "1.3.0")]
        rows.append(row)
    return rows


def ask(interpreter: str, shape: Shape, rounds: int, names: list[str]) -> dict[str, dict[str, float]]:
    """The ratios that the adapters of another interpreter reach, by method and measurement."""
    root = Path(__file__).parents[1]
    command = [interpreter, "-m", "benchmarks.methods", f"--rounds={rounds}", f"--shape={shape.name}", *names]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    printed = subprocess.check_output(command, cwd=root, env=environment, text=True)
    found: dict[str, dict[str, float]] = json.loads(printed.splitlines()[-1])
    return found


def main() -> None:
    """Measure the installed adapters, and print the ratios to the frozen model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shape", choices=[TWO_LAYERS.name, TINY.name], default=TWO_LAYERS.name)
    parser.add_argument("methods", nargs="*", help="only these (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = TINY if arguments.shape == TINY.name else TWO_LAYERS
    found = {}
    for name in arguments.methods or METHODS:
        method = METHODS[name]
        text = (method.old or method.ours) if adapters.__version__.startswith("1.") else method.ours
        seconds = measured({"bare": frozen, "here": adapted(text)}, shape, arguments.rounds)
        found[name] = {measure: times["here"] / times["bare"] for measure, times in seconds.items()}
        print(name, found[name], file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
