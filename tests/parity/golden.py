"""Reads the goldens that ``make_goldens.py`` wrote."""

import functools
import json
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Group:
    """Adapters that were added to one model and saved together."""

    id: str
    adapters: dict[str, str]
    model: str
    fusions: dict[str, str]
    labels: str = ""
    head_type: str = ""
    added_length: int = 0
    add_first: bool = False


@dataclass(frozen=True)
class Case:
    """A setup that 1.3.0 ran on a group; without inputs it is left out, for the reason in ``skipped``."""

    id: str
    group: str
    setup: str = "None"
    inputs: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def architecture(self) -> str:
        return self.id.partition("/")[0]

    @property
    def name(self) -> str:
        return self.id.partition("/")[2]


_INDEX: dict[str, Any] = json.loads((GOLDENS / "index.json").read_text())
GROUPS = {id: Group(id=id, **{"fusions": {}, **row}) for id, row in _INDEX["groups"].items()}
CASES = [Case(**{**row, "inputs": tuple(row.get("inputs", ()))}) for row in _INDEX["cases"]]
_FOLDERS = TemporaryDirectory(prefix="goldens-")


@functools.cache
def archive(architecture: str) -> Path:
    """The unpacked zip of an architecture; it goes away with the process."""
    folder = Path(_FOLDERS.name) / architecture
    with zipfile.ZipFile(GOLDENS / f"{architecture}.zip") as packed:
        packed.extractall(folder)
    return folder


def _nested(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by the path before the last slash, then by the last part."""
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in load_file(file).items():
        folder, _, name = path.rpartition("/")
        nested.setdefault(folder, {})[name] = tensor
    return nested


@functools.cache
def inputs(architecture: str) -> dict[str, dict[str, torch.Tensor]]:
    """Model inputs by name, and ``labels`` by kind."""
    return _nested(archive(architecture) / "inputs.safetensors")


@functools.cache
def expected(architecture: str) -> dict[str, dict[str, torch.Tensor]]:
    """What 1.3.0 computed: ``hidden`` or ``logits`` and ``loss``, by ``<case>/<input>``."""
    return _nested(archive(architecture) / "expected.safetensors")


def arguments(architecture: str, group: Group, name: str) -> dict[str, torch.Tensor]:
    """Fresh keyword arguments of the model for one input, with the labels of the group's head."""
    given = {key: tensor.clone() for key, tensor in inputs(architecture)[name].items()}
    return given | ({"labels": inputs(architecture)["labels"][group.labels].clone()} if group.labels else {})


def saved(root: Path, group: Group) -> dict[tuple[str, str], Path]:
    """The folders of a group below a root, by ``adapters`` or ``fusions`` and name; none if 1.3.0 cannot make it."""
    names = [("adapters", name) for name in group.adapters] + [("fusions", name) for name in group.fusions]
    found = {(kind, name): root / kind / group.id / name for kind, name in names}
    return {key: folder for key, folder in found.items() if folder.is_dir()}


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of a saved folder by kind (the file name bare of 'pytorch_' and suffix)."""
    found = {}
    for file in folder.iterdir():
        if file.suffix in (".bin", ".safetensors"):
            read = load_file if file.suffix == ".safetensors" else functools.partial(torch.load, weights_only=True)
            found[file.stem.removeprefix("pytorch_")] = read(file)
    return found


def settings(folder: Path) -> dict[str, Any]:
    """The JSON files of a saved folder, without the version of the writer."""
    found = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: {key: value for key, value in read.items() if key != "version"} for name, read in found.items()}


@functools.cache
def evidence() -> dict[str, dict[str, Any]]:
    """What ``check_reverse.py`` found out, by ``<architecture>/<group>``."""
    found: dict[str, dict[str, Any]] = json.loads((GOLDENS / "reverse.json").read_text())
    return found


def digest(folders: dict[tuple[str, str], Path]) -> str:
    """What decides whether 1.3.0 can read saved folders: their JSON, their tensors' keys, shapes and types."""
    content = [
        [kind, name, settings(folder), {file: _shapes(weights) for file, weights in tensors(folder).items()}]
        for (kind, name), folder in sorted(folders.items())
    ]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {key: f"{tensor.dtype} {tuple(tensor.shape)}" for key, tensor in weights.items()}
