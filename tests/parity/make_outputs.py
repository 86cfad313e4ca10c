"""Writes ``goldens/fusion_attentions.json`` and ``goldens/multi_heads.zip``: two kinds of output of adapters 1.3.0.

RUN THIS IN THE REFERENCE ENVIRONMENT ONLY (adapters 1.3.0, transformers 4.57.6), after ``make_goldens.py``.

    python tests/parity/make_outputs.py

Fusion attentions are those of the fusions in the goldens, on two architectures. Several heads are on the golden base of
BERT and of GPT-2: adapters and their heads are in the zip, with outputs for every setup of ``SETUPS``; in those that
nest deeper 1.3.0 is wrong (A2).
"""

import json
import logging
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from golden import CASES, GOLDENS, GROUPS, archive, arguments, inputs
from golden_models import disturb
from golden_runs import load, new_model, run
from safetensors.torch import save_file

from adapters import AutoAdapterModel, composition

ARCHITECTURES = ("bert", "gpt2")
HEADS = {"a": 3, "b": 3, "c": 5}
SETUPS = {
    "batch_split": "BatchSplit('a', 'b', batch_sizes=[2, 1])",
    "stack_batch_split": "Stack('c', BatchSplit('b', 'a', batch_sizes=[1, 2]))",
    "parallel": "Parallel('a', 'b')",
    "parallel_of_two_sizes": "Parallel('a', 'c')",
    "stack_parallel": "Stack('c', Parallel('b', 'a'))",
}


def attentions() -> None:
    """One line for each case: fusion -> layer -> place -> (b, s, n)."""
    lines = []
    for case in CASES:
        if not case.inputs or "Fuse" not in case.setup or case.architecture not in ARCHITECTURES:
            continue
        group = GROUPS[case.group]
        model = new_model(archive(case.architecture), group)
        load(model, group, archive(case.architecture))
        for name in case.inputs:
            given = arguments(case.architecture, group, name)
            found = run(model, case.setup, given, output_adapter_fusion_attentions=True).adapter_fusion_attentions
            plain = {
                fusion: {
                    layer: {place: values.round(6).astype(float).round(6).tolist() for place, values in places.items()}
                    for layer, places in layers.items()
                }
                for fusion, layers in found.items()
            }
            lines.append(f"{json.dumps(f'{case.id}/{name}')}: {json.dumps(plain, separators=(',', ':'))}")
    (GOLDENS / "fusion_attentions.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} cases of fusion attentions")


def heads(architecture: str, folder: Path) -> dict[str, torch.Tensor]:
    """Saves the adapters with their heads and returns all outputs, by setup and head."""
    model = AutoAdapterModel.from_pretrained(archive(architecture) / "base", attn_implementation="eager")
    model.config.name_or_path = "golden"
    for name, labels in HEADS.items():
        model.add_adapter(name, config="seq_bn[reduction_factor=16]")
        model.add_classification_head(name, num_labels=labels, layers=1)
        disturb({key: value for key, value in model.named_parameters() if f".{name}." in key}, name)
        (folder / architecture).mkdir(exist_ok=True)
        model.save_adapter(str(folder / architecture / name), name)
    model.eval()
    given = {**inputs(architecture)["right"], "labels": torch.tensor([2, 0, 1])}
    found: dict[str, torch.Tensor] = {}
    for case, setup in SETUPS.items():
        model.set_active_adapters(eval(setup, dict(vars(composition))))
        with torch.no_grad():
            try:
                output = model(**given)
            except Exception as error:  # whatever 1.3.0 raises here is the finding
                print(f"{architecture}/{case}: 1.3.0 raises {type(error).__name__}: {error}")
                continue
        for number, part in enumerate(output.head_outputs):
            found |= {f"{architecture}/{case}/{number}/{kind}": part[kind] for kind in ("logits", "loss")}
        found[f"{architecture}/{case}/loss"] = output.loss
    return found


def several_heads() -> None:
    """The zip, the same bytes for the same content."""
    with tempfile.TemporaryDirectory() as made:
        folder, found = Path(made), {}
        for architecture in ARCHITECTURES:
            found |= heads(architecture, folder)
        save_file({key: tensor.clone().contiguous() for key, tensor in found.items()}, folder / "expected.safetensors")
        with zipfile.ZipFile(GOLDENS / "multi_heads.zip", "w") as packed:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    entry = zipfile.ZipInfo(str(file.relative_to(folder)))
                    packed.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    print(f"{len(found)} tensors of several heads")


if __name__ == "__main__":
    if version("adapters") != "1.3.0":
        sys.exit(f"make_outputs.py: adapters {version('adapters')} is installed; it must be 1.3.0.")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    attentions()
    several_heads()
