"""The native format of adapters: folders that 1.x reads, and the other way round."""

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ..bounds import bounded
from ..configuration import AdapterConfig
from ..configuration.hashing import get_adapter_config_hash
from ..configuration.resolve import build_config
from ..errors import CheckpointError, UnknownAdapterError, check_type, suggestion, text_of
from ..interface import INTERFACE_FILE
from . import files, heads, hub, legacy, peft, weights
from .atomic import Job
from .files import ADAPTER, HEAD, Content, Contents, Gone
from .loaders import WeightsLoader
from .placing import Adapters, Saved, all_or_nothing, place
from .provenance import full_config

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

Loaders = Iterable[WeightsLoader] | None
Folder = str | os.PathLike[str]
NATIVE = "adapters"
"""The name of this format."""


def save_adapter(
    model: "ModelAdaptersMixin",
    save_directory: Folder,
    adapter_name: str,
    with_head: bool = True,
    meta_dict: Mapping[str, Any] | None = None,
    custom_weights_loaders: Loaders = None,
    use_safetensors: bool = True,
    format: str = NATIVE,
) -> None:
    """Writes an adapter, and the head of the same name if there is one, into a folder: all files or none.

    Args:
        with_head: Without, the head that an earlier save under this name has left in the folder is removed too.
        meta_dict: More entries for the config file; they replace none of its own.
        custom_weights_loaders: Each saves what it wants into the folder afterwards.
        format: "adapters", which 1.x reads too, or "peft", which ``PeftModel.from_pretrained`` reads.

    Raises:
        UnknownAdapterError: The model has no such adapter.
        CheckpointError: The folder cannot be written, or PEFT cannot express a field.
    """
    contents = contents_of(model, adapter_name, with_head, meta_dict or {}, format)
    files.write_tree(save_directory, [("", contents)], use_safetensors, more=_interface(model, save_directory))
    for loader in custom_weights_loaders or ():
        loader.save(str(save_directory), adapter_name)


def save_all_adapters(
    model: "ModelAdaptersMixin",
    save_directory: Folder,
    with_head: bool = True,
    meta_dict: Mapping[str, Any] | None = None,
    custom_weights_loaders: Loaders = None,
    use_safetensors: bool = True,
    format: str = NATIVE,
) -> None:
    """Writes each adapter into a folder of its name, with its configuration's hash as ``config_id``.

    Raises:
        CheckpointError: A folder cannot be written; all of them are then as they were.
    """
    names, meta = [*model.adapters_config.adapters], dict(meta_dict or {})
    folders = ((name, contents_of(model, name, with_head, meta | config_id(model, name), format)) for name in names)
    files.write_tree(save_directory, folders, use_safetensors, more=_interface(model, save_directory))
    for loader in custom_weights_loaders or ():
        for name in names:
            loader.save(str(files.subfolder(save_directory, name)), name)


def _interface(model: "ModelAdaptersMixin", directory: Folder) -> dict[str, Job]:
    """The file with what the user says of the model."""
    interface = model.adapter_sites.anatomy.interface
    content = None if interface is None else interface.content(model.config.model_type)
    return {} if content is None else {INTERFACE_FILE: files.json_job(directory, content)}


def contents_of(
    model: "ModelAdaptersMixin", name: str, with_head: bool, meta: Mapping[str, Any], format: str = NATIVE
) -> Contents:
    """What is saved of an adapter, and of the head of its name.

    Raises:
        UnknownAdapterError: The model has no such adapter.
        CheckpointError: There is no such format, or it cannot express the adapter.
    """
    config = _config(model, name)
    if format == "peft":
        return peft.contents_of(model, name, config, with_head)
    if format != NATIVE:
        raise CheckpointError(f"save_adapter(format={format!r}): there are the formats {NATIVE!r} and 'peft'.")
    tensors = weights.gathered(weights.adapter_slots(model, name), weights.prefix_of(model))
    head = heads.content(model, name) if with_head else None
    return {ADAPTER: Content(full_config(model, name, config.to_dict(), meta), tensors), HEAD: head or Gone(name)}


def config_id(model: "ModelAdaptersMixin", name: str) -> dict[str, str]:
    """The hash of a configuration, as a further entry of its file."""
    return {"config_id": get_adapter_config_hash(_config(model, name).to_dict())}


def _config(model: "ModelAdaptersMixin", name: str) -> AdapterConfig:
    config = model.adapters_config.get(name)
    if config is None:
        raise UnknownAdapterError(
            f"save_adapter({name!r}): No adapter of this type with the given name is part of this model; "
            f"{suggestion(name, model.adapters_config.adapters)}"
        )
    return config


def load_adapter(
    model: "ModelAdaptersMixin",
    adapter_name_or_path: Folder,
    config: Any = None,
    version: str | None = None,
    model_name: str | None = None,
    load_as: str | None = None,
    with_head: bool = True,
    custom_weights_loaders: Loaders = None,
    leave_out: list[int] | None = None,
    id2label: Mapping[int, str] | None = None,
    set_active: bool = False,
    use_safetensors: bool = True,
    *,
    loading_info: dict[str, Any] | None = None,
    num_labels: int | None = None,
    undo: ExitStack | None = None,
    **download_arguments: Any,
) -> str:
    """Adds an adapter, and the head saved with it, from a folder or the Hub; returns its name.

    An adapter of that name is overwritten. A head that is not for this class of model is left out with a warning.

    Args:
        config, model_name: Without effect; they named entries of an archive that is gone.
        version: The revision on the Hub.
        load_as: The name in this model; by default the one it was saved under.
        custom_weights_loaders: Each loads what it wants from the folder afterwards.
        leave_out: Layers that get no modules, besides those of the saved configuration.
        id2label: Labels of the head in place of the saved ones; `num_labels=n` gives ``LABEL_0`` to ``LABEL_<n-1>``.
        use_safetensors: Which weights file is read if both formats are there.
        loading_info: Receives the lists ``missing_keys`` and ``unexpected_keys``.
        undo: The enclosing load of a setup.
        download_arguments: See ``hub.resolve``.

    Raises:
        CheckpointError: The checkpoint cannot be found, is broken, or does not fit the model, which is as it was.
    """
    asked, id2label = _checked(adapter_name_or_path, (config, model_name), load_as, num_labels, id2label)
    folder = hub.resolve(asked, os.fspath(adapter_name_or_path), version, **download_arguments)
    beside = load_as, id2label, use_safetensors
    if peft.is_peft(full := files.read_json(folder / ADAPTER.config)):
        peft.check_arguments(asked, leave_out=leave_out, custom_weights_loaders=custom_weights_loaders)
        load_as = load_as or peft.default_name(adapter_name_or_path)
        adapter, head = peft.read_folder(model, folder, full, asked, load_as, with_head, id2label, use_safetensors)
    else:
        adapter = _read_adapter(model, folder, full, load_as, leave_out or [], use_safetensors)
        head = heads.beside_adapter(model, folder, adapter.name, *beside) if with_head else None
    with all_or_nothing(model, undo) as changes:
        with bounded(asked, adapter.file, adapter.weights):
            place(Adapters(model), adapter, asked, loading_info, changes, complete=leave_out is None)
        if set_active:
            model.set_active_adapters(adapter.name)
        if head is not None:
            heads.place_head(model, head, asked, set_active, loading_info, changes)
        more: dict[str, Any] = {"loading_info": loading_info, "id2label": id2label, "set_active": set_active}
        for loader in custom_weights_loaders or ():
            loader.load(str(folder), load_as=load_as, main_load_name=adapter.name, **more)
    return adapter.name


def _checked(path: Any, former: Any, load_as: Any, labels: Any, id2label: Any) -> tuple[str, Mapping[int, str] | None]:
    """The call, for messages, and the labels that are asked for.

    Raises:
        ConfigError: An argument is of another type.
    """
    asked = f"load_adapter({text_of('load_adapter(adapter_name_or_path)', path)!r})"
    if former != (None, None):
        warnings.warn(f"{asked}: config and model_name have no effect; leave them out.", FutureWarning, stacklevel=4)
    check_type(f"{asked}: load_as", load_as, (str, NoneType), "a string, or None")
    check_type(f"{asked}: num_labels", labels, (int, NoneType), "a whole number, or None")
    return asked, id2label if labels is None else {index: f"LABEL_{index}" for index in range(labels)}


def _read_adapter(
    model: "ModelAdaptersMixin",
    folder: Path,
    full: Mapping[str, Any],
    load_as: str | None,
    leave_out: list[int],
    use_safetensors: bool,
) -> Saved[AdapterConfig]:
    """The adapter, whose config file holds `full`; touches no model.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    file = folder / ADAPTER.config
    old = full.get("name") if isinstance(full.get("name"), str) else None
    name = load_as or old
    if not name:
        raise CheckpointError(f"{str(file)!r}: 'name' is {old!r}; it must be the adapter's name. Pass load_as.")
    saved = legacy.upgraded_weights(files.read_weights(folder, ADAPTER, use_safetensors))
    try:
        config = build_config(_without_layers(legacy.upgraded_config(full, saved, file), leave_out))
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # AdapterError is a ValueError
        raise CheckpointError(f"{str(file)!r}: 'config' cannot be used: {error}") from error
    config = legacy.completed(config, full, model.adapters_config.get(name))
    return Saved(name, config, weights.renamed(saved, old or name, name), full)


def _without_layers(config: Mapping[str, Any], leave_out: list[int]) -> dict[str, Any]:
    if config.get("architecture") == "union":
        return {**config, "configs": [_without_layers(part, leave_out) for part in config["configs"]]}
    if not leave_out:
        return dict(config)
    return {**config, "leave_out": sorted({*(config.get("leave_out") or []), *leave_out})}
