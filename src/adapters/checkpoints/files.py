"""Writing and reading the files of a checkpoint folder. Nothing that is read here is ever executed."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, listing

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """The file names of one kind of checkpoint."""

    what: str
    config: str
    safetensors: str
    torch: str


ADAPTER = Kind("adapter", "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
HEAD = Kind("prediction head", "head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
FUSION = Kind(
    "AdapterFusion",
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)
SETUP_FILE = "adapter_setup.json"


@dataclass(frozen=True)
class Content:
    """What stands in the files of one kind: a JSON-able config and tensors by key."""

    config: Mapping[str, Any]
    weights: Weights


def write(directory: str | os.PathLike[str], contents: Mapping[Kind, Content], use_safetensors: bool) -> None:
    """Writes the files of all `contents` into a directory, which is made if need be: either all of them or none.

    Weights in the other format are removed, or a later load might find those of an earlier save.

    Raises:
        CheckpointError: The config is not JSON, or the directory cannot be written to.
    """
    jobs: dict[str, Callable[[Path], Any]] = {}
    for kind, content in contents.items():
        jobs[kind.config] = partial(Path.write_text, data=as_json(content.config, directory), encoding="utf-8")
        if use_safetensors:
            jobs[kind.safetensors] = partial(save_file, content.weights)
        else:
            jobs[kind.torch] = partial(torch.save, content.weights)
    _write_all(_folder(directory), jobs)
    for kind in contents:
        (Path(directory) / (kind.torch if use_safetensors else kind.safetensors)).unlink(missing_ok=True)


def write_json(directory: str | os.PathLike[str], file_name: str, content: Mapping[str, Any]) -> None:
    """Writes one JSON file into a directory, which is made if need be.

    Raises:
        CheckpointError: The content is not JSON, or the directory cannot be written to.
    """
    text = as_json(content, directory, sort_keys=False)
    _write_all(_folder(directory), {file_name: partial(Path.write_text, data=text, encoding="utf-8")})


def as_json(content: Mapping[str, Any], directory: str | os.PathLike[str], sort_keys: bool = True) -> str:
    """The text of a JSON file in `directory`.

    Raises:
        CheckpointError: A value is not JSON.
    """
    try:
        return json.dumps(content, indent=2, sort_keys=sort_keys)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"saving to {str(directory)!r}: a value cannot be JSON: {error}. Change it.") from error


def subfolder(directory: str | os.PathLike[str], name: str) -> Path:
    """The folder for an adapter, fusion or head inside a directory.

    Raises:
        CheckpointError: The name would lead out of the directory, or to a folder below another one.
    """
    if name in ("", ".", "..") or {"/", "\\", "\0"} & {*name}:
        raise CheckpointError(
            f"{str(directory)!r}: {name!r} cannot name a folder in it; save it alone, to a path of your choice."
        )
    return Path(directory) / name


def _folder(directory: str | os.PathLike[str]) -> Path:
    if not os.fspath(directory):
        raise CheckpointError("saving to '': an empty path names no directory; '.' is the current one.")
    return Path(directory)


def _write_all(folder: Path, jobs: Mapping[str, Callable[[Path], Any]]) -> None:
    """Runs each job on a temporary file beside its target, then moves all of them in place."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"saving to {str(folder)!r}: this is a file; pass the path of a directory.")
    if blocked := [name for name in jobs if (folder / name).is_dir()]:
        raise CheckpointError(f"saving to {str(folder)!r}: {blocked[0]!r} is a directory there; remove it first.")
    temporary: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, job in jobs.items():
            temporary[name] = folder / f".{name}.{token_hex(4)}"
            job(temporary[name])
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        raise CheckpointError(
            f"saving to {str(folder)!r}: {error}; old files are as they were. Pass another directory."
        ) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: The file is missing, unreadable, or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{str(file)!r}: {error.strerror}; {_present(file.parent)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(file)!r}: the file is broken, not JSON ({error}). Save or download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(file)!r}: holds a JSON {type(content).__name__}; it must be an object.")
    return content


def is_list_of_names(value: Any) -> TypeGuard[list[str]]:
    """Whether a value that was read is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def read_weights(folder: Path, kind: Kind, use_safetensors: bool = True) -> Weights:
    """The tensors of a folder, on CPU; whichever format is there, the preferred one if both are.

    Raises:
        CheckpointError: There is no weights file, or it is broken or holds more than tensors.
    """
    names = [kind.safetensors, kind.torch] if use_safetensors else [kind.torch, kind.safetensors]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{str(folder)!r}: it has neither {names[0]!r} nor {names[1]!r}; {_present(folder)}")
    return _read_tensors(file)


def _read_tensors(file: Path) -> Weights:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken pickle can raise is without limit
        details = (str(error).splitlines() or ["no details"])[0]
        raise CheckpointError(
            f"{str(file)!r}: truncated, broken, or with objects other than tensors, which are refused: they could run "
            f"code ({type(error).__name__}: {details}). Save or download it again."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise CheckpointError(f"{str(file)!r}: no weights file of adapters; it must hold tensors by name.")
    return content


def _present(folder: Path) -> str:
    if not folder.is_dir():
        return "this directory does not exist. Pass the path of a saved checkpoint."
    found = sorted(path.name for path in folder.iterdir())[:8]
    return f"the directory holds {listing(found)}. Pass the path of a saved checkpoint."
