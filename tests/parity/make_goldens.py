"""Writes ``goldens/``: what adapters 1.3.0 saves and computes, for the tests to compare this library with.

RUN THIS IN THE REFERENCE ENVIRONMENT ONLY (adapters 1.3.0, transformers 4.57.6): it never imports this library.

    python tests/parity/make_goldens.py [ARCHITECTURE ...]

One zip per architecture, ``goldens/<architecture>.zip``, holds

    base/                         the base model as ``save_pretrained`` of transformers 4.57 writes it
    inputs.safetensors            ``<input>/<argument>`` and ``labels/<kind>``, shared by all cases
    adapters/<group>/<name>/      an adapter (and its head) as 1.3.0's ``save_adapter`` writes it
    fusions/<group>/<name>/       a fusion as 1.3.0's ``save_adapter_fusion`` writes it
    expected.safetensors          ``<case>/<input>/hidden|logits|loss`` as 1.3.0 computes it

(groups of methods outside the core start with ``other/``)
and ``goldens/index.json`` lists the groups and cases, and with a reason those that are left out. Outputs are only those
of real tokens. Before an output becomes a golden it is checked against laws that hold whatever the implementation:
an active adapter has an effect, padding on the right has none, the rows of a batch split and the channels of a parallel
block are those of separate runs. What breaks a law is recorded as wrong in 1.x and not kept.
"""

import json
import logging
import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from golden_cases import ARCHITECTURES, LEFT_OUT, Group, all_groups
from golden_models import LENGTHS, base_model, disturb, labels, model_inputs
from golden_runs import deviation, load, new_model, outputs, real_tokens, run
from safetensors.torch import save_file

from adapters import composition
from adapters.configuration import DynamicAdapterFusionConfig

GOLDENS = Path(__file__).parent / "goldens"
VERSIONS = {"adapters": "1.3.0", "transformers": "4.57.6"}
TOLERANCE = 1e-5

Outputs = dict[str, torch.Tensor]


class Wrong(Exception):
    """1.3.0 computes something that breaks a law."""


def populate(model: Any, group: Group) -> None:
    """Adds the group's adapters, head and fusions, and gives every new tensor a value of its own."""
    before = {name for name, _ in model.named_parameters()}
    for name, config in group.adapters.items():
        model.add_adapter(name, config=config)
    for name, config in group.fusions.items():
        fusion = DynamicAdapterFusionConfig(**eval(config)) if config.startswith("{") else config
        model.add_adapter_fusion(name.split(","), fusion)
    if group.head_type:
        getattr(model, f"add_{group.head_type}_head")("a", **group.head_arguments)
    fresh = {name: tensor for name, tensor in model.named_parameters() if name not in before}
    if group.labels and not group.head_type:
        prefix = f"{model.base_model_prefix}."
        tied = {id(tensor) for name, tensor in model.named_parameters() if name.startswith(prefix)}
        fresh |= {n: t for n, t in model.named_parameters() if not n.startswith(prefix) and id(t) not in tied}
    rotations = {name: tensor for name, tensor in fresh.items() if name.endswith("parametrizations.weight.original")}
    disturb({name: tensor for name, tensor in fresh.items() if name not in rotations}, group.id)
    disturb(rotations, group.id)
    for tensor in rotations.values():  # 1.x reads the diagonal as integers, so it has to stay at its start (E3)
        rows = range(tensor.shape[0])
        tensor.data[rows, rows] = -1.0
    model.eval()


def check_laws(model: Any, setup: Any, inputs: dict[str, torch.Tensor], name: str, got: torch.Tensor) -> None:
    """Raises ``Wrong`` when the hidden states break a law that holds for any correct implementation."""
    if not torch.isfinite(got).all():
        raise Wrong("the outputs are not finite")
    plain = {key: tensor for key, tensor in inputs.items() if key != "task_ids"}
    bare = real_tokens(run(model, None, plain).last_hidden_state, inputs)
    if got.shape == bare.shape and deviation(got, bare) < 1e-3:
        raise Wrong(f"the active adapters have no effect on input {name}")
    inner = setup[0] if isinstance(setup, composition.Stack) and len(setup) == 1 else setup
    if isinstance(inner, (composition.BatchSplit, composition.Parallel)):
        check_rows(model, inner, inputs, got)
    elif name in ("right", "composed") and not any(block in repr(setup) for block in ("BatchSplit", "Parallel")):
        check_padding(model, setup, inputs, got)


def check_rows(model: Any, block: Any, inputs: dict[str, torch.Tensor], got: torch.Tensor) -> None:
    """The rows of a batch split and the channels of a parallel block are those of separate runs."""
    whole = [run(model, composition.Stack(child), inputs).last_hidden_state for child in block]
    if isinstance(block, composition.BatchSplit):
        starts = [sum(block.batch_sizes[:i]) for i in range(len(block))]
        whole = [out[start : start + size] for out, start, size in zip(whole, starts, block.batch_sizes, strict=True)]
    wanted = real_tokens(torch.cat(whole), inputs)
    if deviation(got, wanted) > TOLERANCE:
        raise Wrong(f"{type(block).__name__} differs from separate runs by {deviation(got, wanted):.1e}")


def check_padding(model: Any, setup: Any, inputs: dict[str, torch.Tensor], got: torch.Tensor) -> None:
    """Each right-padded row alone, without its padding and without a mask, gives the same."""
    tokens = inputs.get("decoder_input_ids")
    kept = inputs.get("decoder_attention_mask", torch.ones_like(tokens) if tokens is not None else None)
    rows = []
    for row, length in enumerate(LENGTHS):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length]}
        if tokens is not None:
            alone["decoder_input_ids"] = tokens[row : row + 1, : int(kept[row].sum())]
        rows.append(run(model, setup, alone).last_hidden_state[0])
    if deviation(torch.cat(rows), got) > 2 * TOLERANCE:
        raise Wrong(f"padding changes the outputs of real tokens by {deviation(torch.cat(rows), got):.1e}")


def save(model: Any, group: Group, folder: Path) -> None:
    """Adapters and fusions as 1.3.0 writes them; safetensors where it can (not with aliased tensors)."""

    def write(kind: str, name: str, call: Any) -> None:
        target = folder / kind / group.id / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            call(str(target), name, use_safetensors=group.id != "seq_bn")
        except RuntimeError:
            shutil.rmtree(target)
            call(str(target), name, use_safetensors=False)

    for name in group.adapters:
        write("adapters", name, model.save_adapter)
    for name in group.fusions:
        write("fusions", name, model.save_adapter_fusion)


def check_reload(group: Group, folder: Path, kept: dict[str, Outputs], inputs: dict[str, Any]) -> None:
    """1.3.0 itself gets the same outputs from the files, or they are not worth comparing with."""
    model = new_model(folder, group)
    load(model, group, folder)
    for key, wanted in kept.items():
        case, _, name = key.rpartition("/")
        found = outputs(model, group, group.setups[case.removeprefix(group.id).removeprefix(".")], inputs[name])
        for kind, tensor in wanted.items():
            if deviation(found[kind], tensor) > TOLERANCE:
                raise Wrong(f"reloading its own file changes {kind} by {deviation(found[kind], tensor):.1e}")


class Archive:
    """Everything of one architecture and sub-tree: runs the groups and collects index rows."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder
        self.rows: list[dict[str, Any]] = []
        self.expected: Outputs = {}
        base_model(architecture).save_pretrained(folder / "base")
        self.inputs, self.labels = model_inputs(architecture), labels(architecture)
        flat = {f"{name}/{key}": tensor for name, group in self.inputs.items() for key, tensor in group.items()}
        flat |= {f"labels/{name}": tensor for name, tensor in self.labels.items()}
        save_file({name: tensor.clone() for name, tensor in flat.items()}, folder / "inputs.safetensors")

    def inputs_of(self, group: Group) -> dict[str, dict[str, torch.Tensor]]:
        names = dict.fromkeys(name if name in self.inputs else "plain" for name in group.inputs)
        extra = {"labels": self.labels[group.labels]} if group.labels else {}
        return {name: self.inputs[name] | extra for name in names}

    def row(self, group: Group, name: str, **more: Any) -> None:
        self.rows.append({"id": f"{self.architecture}/{name}", "group": group.id, **more})

    def run_group(self, group: Group) -> None:
        """Adds the group's files and cases, or the reason why there are none."""
        try:
            model = new_model(self.folder, group)
            populate(model, group)
            save(model, group, self.folder)
        except Exception as error:  # whatever 1.3.0 raises here is the finding
            shutil.rmtree(self.folder / "adapters" / group.id, ignore_errors=True)
            self.row(group, group.id, skipped=f"1.3.0 raises {type(error).__name__}: {first_line(error)}")
            return
        kept: dict[str, Outputs] = {}
        for suffix, setup in group.setups.items():
            self.run_case(model, group, suffix, setup, kept)
        if kept:
            self.keep(group, kept)
        elif self.architecture not in group.known_wrong:  # a file that cannot be used is no file to be read
            shutil.rmtree(self.folder / "adapters" / group.id)

    def run_case(self, model: Any, group: Group, suffix: str, setup: str, kept: dict[str, Outputs]) -> None:
        """One setup on all inputs of the group."""
        case = ".".join(filter(None, (group.id, suffix)))
        if self.architecture in group.known_wrong:
            self.row(group, case, setup=setup, skipped=group.known_wrong[self.architecture])
            return
        good, bad = [], []
        for name, inputs in self.inputs_of(group).items():
            try:
                found = outputs(model, group, setup, inputs)
                if not group.labels and group.adapters:
                    check_laws(model, model.active_adapters, inputs, name, found["hidden"])
                kept[f"{case}/{name}"] = found
                good.append(name)
            except Wrong as error:
                bad.append(f"1.3.0 is wrong: {error}")
            except Exception as error:
                bad.append(f"1.3.0 raises {type(error).__name__}: {first_line(error)}")
        reason = {"skipped": "; ".join(dict.fromkeys(bad))} if bad else {}
        self.row(group, case, setup=setup, **({"inputs": good} if good else {}), **reason)

    def keep(self, group: Group, kept: dict[str, Outputs]) -> None:
        """Takes the outputs over, unless 1.3.0 cannot read its own files."""
        try:
            check_reload(group, self.folder, kept, self.inputs_of(group))
        except Wrong as error:
            for row in self.rows:
                if row["group"] == group.id and row.pop("inputs", None):
                    row["skipped"] = f"1.3.0 is wrong: {error}"
            return
        for key, found in kept.items():
            self.expected |= {f"{key}/{kind}": tensor.clone().contiguous() for kind, tensor in found.items()}

    def write(self, path: Path) -> None:
        """The zip, the same bytes for the same content."""
        save_file(self.expected, self.folder / "expected.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(self.folder.rglob("*")):
                if file.is_file():
                    entry = zipfile.ZipInfo(str(file.relative_to(self.folder)))
                    archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED, 9)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def group_row(group: Group) -> dict[str, Any]:
    """What a test needs to build the group's model."""
    row: dict[str, Any] = {"adapters": group.adapters, "model": group.model}
    row |= {"fusions": group.fusions} if group.fusions else {}
    row |= {"added_length": group.added_length} if group.added_length else {}
    row |= {"add_first": True} if group.add_first else {}
    row |= {"labels": group.labels} if group.labels else {}
    row |= {"head_type": group.head_type} if group.head_type else {}
    return row


def make(architecture: str) -> list[dict[str, Any]]:
    """Writes one zip and returns its index rows."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(architecture, Path(folder))
        for group in all_groups():
            if group.concerns(architecture):
                archive.run_group(group)
        archive.write(GOLDENS / f"{architecture}.zip")
    return archive.rows


def write_index(index: dict[str, Any]) -> None:
    """One line per group and per case, so that a change of a golden is a change of a line."""
    lines = ['{"versions": ' + json.dumps(index["versions"]), ' "left_out": ' + json.dumps(index["left_out"], indent=2)]
    for part in ("groups", "cases"):
        left, right = "{}" if part == "groups" else "[]"
        entries = index[part].items() if part == "groups" else ((None, row) for row in index[part])
        texts = [(f"{json.dumps(key)}: " if key else "") + json.dumps(row) for key, row in entries]
        lines.append(f' "{part}": {left}\n  ' + ",\n  ".join(texts) + f"\n {right}")
    (GOLDENS / "index.json").write_text(",\n".join(lines) + "}\n")


def main(wanted: list[str]) -> None:
    for package, needed in VERSIONS.items():
        if version(package) != needed:
            problem = f"{package} {version(package)} is installed; it must be {needed}"
            sys.exit(f"make_goldens.py: {problem}. Use the reference environment.")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    path = GOLDENS / "index.json"
    old = json.loads(path.read_text())["cases"] if path.exists() else []
    cases: list[dict[str, Any]] = []
    for architecture in ARCHITECTURES:
        if wanted and architecture not in wanted:
            cases += [row for row in old if row["id"].startswith(f"{architecture}/")]
        else:
            cases += make(architecture)
    groups = {group.id: group_row(group) for group in all_groups()}
    write_index(
        {"left_out": LEFT_OUT, "versions": VERSIONS | {"torch": torch.__version__}, "groups": groups, "cases": cases}
    )
    left_out = sum("inputs" not in case for case in cases)
    size = sum(file.stat().st_size for file in GOLDENS.iterdir())
    print(f"{len(cases) - left_out} cases, {left_out} left out, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
