"""Writing and reading the files of a checkpoint folder. Nothing that is read here is ever executed."""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, listing, text_of
from . import atomic
from .atomic import Job

Weights = dict[str, Tensor]
READ_AT_ONCE = 16 << 20
"""Bytes of a weights file: smaller ones are read in half the time if they are in memory twice for a moment."""
LARGEST_JSON = 16 << 20
"""Bytes: ten thousand labels have one."""


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


@dataclass(frozen=True)
class Gone:
    """Says that there are no files of one kind: those of an earlier save under this name, or under none, go."""

    name: str


Contents = Mapping[Kind, Content | Gone]


def write(directory: str | os.PathLike[str], contents: Contents, use_safetensors: bool) -> None:
    """Writes the files of all `contents` into a directory, which is made if need be: either all of them or none.

    Weights in the other format are removed, or a later load might find those of an earlier save.

    Raises:
        CheckpointError: The config is not JSON, or the directory cannot be written to.
    """
    write_tree(directory, [("", contents)], use_safetensors)


def write_tree(
    directory: str | os.PathLike[str],
    folders: Iterable[tuple[str, Contents]],
    use_safetensors: bool,
    more: Mapping[str, Job] | None = None,
) -> None:
    """Writes into folders of a directory, by name (``""`` is the directory itself): all files of all of them or none.

    Args:
        folders: What is written where; read one at a time.
        more: Further files of the directory itself.

    Raises:
        CheckpointError: A config is not JSON, a name is no name of a folder, or the directory cannot be written to.
    """
    root, stale = root_of(directory), set[str]()

    def jobs() -> Iterator[tuple[str, Job]]:
        for name, contents in folders:
            folder = subfolder(root, name) if name else root
            for kind, content in contents.items():
                if isinstance(content, Gone):
                    stale.update(_place(root, file) for file in _earlier(folder, kind, content.name))
                    continue
                present, other = (kind.safetensors, kind.torch) if use_safetensors else (kind.torch, kind.safetensors)
                text = as_json(content.config, folder)
                yield _place(root, folder / kind.config), partial(Path.write_text, data=text, encoding="utf-8")
                write_weights = save_file if use_safetensors else torch.save
                yield _place(root, folder / present), partial(write_weights, content.weights)
                if (folder / other).exists():
                    stale.add(_place(root, folder / other))
        for name, job in (more or {}).items():
            yield _place(root, root / name), job

    with or_told(root):
        atomic.write_all(root, jobs(), stale)


@contextmanager
def or_told(root: Path) -> Iterator[None]:
    """Tells what the disk, or what writes to it, has against the block."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        raise CheckpointError(
            f"saving to {str(root)!r}: {error}; old files are as they were. Pass another directory."
        ) from error


def _earlier(folder: Path, kind: Kind, name: str) -> list[Path]:
    """The files that an earlier save of one kind has left in a folder."""
    with suppress(CheckpointError):  # there are none, or they are not ours
        if read_json(folder / kind.config).get("name") in (name, None):
            return [folder / each for each in (kind.config, kind.safetensors, kind.torch) if (folder / each).exists()]
    return []


def _place(root: Path, file: Path) -> str:
    if file.parent.exists() and not file.parent.is_dir():
        raise CheckpointError(f"saving to {str(file.parent)!r}: this is a file; pass the path of a directory.")
    if file.is_dir():
        raise CheckpointError(f"saving to {str(file.parent)!r}: {file.name!r} is a directory there; remove it first.")
    return file.relative_to(root).as_posix()


def json_job(directory: str | os.PathLike[str], content: Mapping[str, Any]) -> Job:
    """What writes a JSON file into a directory, its keys in their order.

    Raises:
        CheckpointError: The content is not JSON.
    """
    return partial(Path.write_text, data=as_json(content, directory, sort_keys=False), encoding="utf-8")


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


def root_of(directory: str | os.PathLike[str]) -> Path:
    """The path of a directory to write into.

    Raises:
        CheckpointError: It is a file, or empty.
    """
    if not text_of("save to", directory):
        raise CheckpointError("saving to '': an empty path names no directory; '.' is the current one.")
    root = Path(directory)
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"saving to {str(root)!r}: this is a file; pass the path of a directory.")
    return root


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: The file is missing, unreadable, or not a JSON object.
    """
    atomic.finish_around(file.parent)
    try:
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{str(file)!r}: has {size:,} bytes; a config has at most {LARGEST_JSON:,}.")
        content = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
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
            whole = file.stat().st_size >= READ_AT_ONCE
            return load_file(file) if whole else dict(sorted(load(file.read_bytes()).items()))
        _refuse_compressed(file)
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
    size = file.stat().st_size
    if lying := [key for key, tensor in content.items() if tensor.numel() * tensor.element_size() > size]:
        raise CheckpointError(
            f"{str(file)!r}: {lying[0]!r} has shape {tuple(content[lying[0]].shape)}, more than the {size:,} bytes of "
            "the file can hold. Save or download it again."
        )
    return content


def _refuse_compressed(file: Path) -> None:
    """torch stores what it writes as it is; what is compressed may become larger than any memory."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, as torch never writes them")


def _present(folder: Path) -> str:
    if not folder.is_dir():
        return "this directory does not exist. Pass the path of a saved checkpoint."
    found = sorted(path.name for path in folder.iterdir())[:8]
    return f"the directory holds {listing(found)}. Pass the path of a saved checkpoint."
