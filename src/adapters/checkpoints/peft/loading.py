"""Loading a folder of PEFT into a model, all or nothing."""

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.models.auto import modeling_auto

from ...errors import CheckpointError
from .. import files, heads, weights
from ..placing import Adapters, all_or_nothing, place
from .draft import Options, Tensors, some
from .reading import Reading, read

if TYPE_CHECKING:
    from ...model import ModelAdaptersMixin

PEFT = files.Kind("PEFT adapter", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
TASKS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
}
"""PEFT's names of tasks, each with that of transformers."""


def is_peft(folder: Path) -> bool:
    """Whether the folder holds an adapter of PEFT."""
    file = folder / PEFT.config
    return file.is_file() and "peft_type" in files.read_json(file)


def load(
    model: "ModelAdaptersMixin",
    folder: Path,
    asked: str,
    name: str,
    with_head: bool = True,
    set_active: bool = False,
    id2label: Mapping[int, str] | None = None,
    use_safetensors: bool = True,
    loading_info: dict[str, Any] | None = None,
    undo: ExitStack | None = None,
) -> str:
    """Adds an adapter, and the head that was trained with it, from a folder of PEFT; returns its name.

    Args:
        asked: The call, for messages.
        name: What it is called in the model.

    Raises:
        CheckpointError: The folder is broken, or cannot be mapped; the message names the option.
    """
    options = files.read_json(folder / PEFT.config)
    reading = read(model, options, files.read_weights(folder, PEFT, use_safetensors), name, asked, alone=True)
    labels = None if id2label is None else {label: index for index, label in id2label.items()}
    with all_or_nothing(model, undo) as changes:
        put(model, reading, options, asked, with_head, labels, loading_info, changes)
        if set_active:
            model.set_active_adapters(name)
    return name


def put(
    model: "ModelAdaptersMixin",
    reading: Reading,
    options: Options,
    asked: str,
    with_head: bool,
    labels: Mapping[str, int] | None,
    loading_info: dict[str, Any] | None,
    undo: ExitStack,
) -> None:
    """Adds an adapter that was read, and its head; closing `undo` takes it back.

    Raises:
        CheckpointError: Tensors do not fit the model.
    """
    info: dict[str, Any] = {}
    place(Adapters(model), reading.saved, asked, info, undo)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise CheckpointError(
            f"{asked}: the file and the configuration differ at {some(wrong)}. Save it again in PEFT."
        )
    if loading_info is not None:
        for key, values in info.items():
            loading_info.setdefault(key, []).extend(values)
    if reading.head and with_head:
        _put_head(model, reading.head, options, reading.saved.name, asked, labels, undo)


def _put_head(
    model: "ModelAdaptersMixin",
    tensors: Tensors,
    options: Options,
    name: str,
    asked: str,
    labels: Mapping[str, int] | None,
    undo: ExitStack,
) -> None:
    prefix = f"{model.base_model_prefix}."
    inside = {key for key, _ in model.base_model.named_parameters()} if model.base_model is not model else set()
    if within := [key for key in tensors if key.removeprefix(prefix) in inside]:
        raise CheckpointError(
            f"{asked}: modules_to_save={options.get('modules_to_save')!r} cannot be mapped; {some(within)} are weights "
            "of the base model, which adapters leave alone here. Merge the adapter in PEFT."
        )
    if heads.is_flexible(model):
        known = {"model_class": _class_of(model, options), "label2id": labels}
        found = heads.fitted(model, heads.SavedHead(None, None, tensors, known), name)
        if isinstance(found, str):
            warnings.warn(f"{asked}: the head is left out: {found}", stacklevel=6)
        else:
            heads.place_head(model, found, asked, False, None, undo)
        return
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    slots: weights.Slots = {key: (state[key],) for key in tensors if key in state}
    if len(slots) < len(tensors):
        missing = some(key for key in tensors if key not in slots)
        warnings.warn(f"{asked}: the head is left out: {type(model).__name__} has no {missing}.", stacklevel=6)
        return
    fit = weights.compare(slots, tensors, (), "", asked, f"This model is a {type(model).__name__}.")
    undo.callback(weights.fill, slots, {key: parts[0].detach().clone() for key, parts in slots.items()})
    weights.fill(slots, fit.matched)


def _class_of(model: "ModelAdaptersMixin", options: Options) -> str:
    """The name of the class of model that an adapter was made on."""
    known: Mapping[str, str] = options.get("auto_mapping") or {}
    task = TASKS.get(str(options.get("task_type")))
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") if task else {}
    return str(known.get("base_model_class", names.get(model.config.model_type)))


def default_name(asked_for: str | os.PathLike[str]) -> str:
    """What an adapter of PEFT, which has no name, is called by default: as its folder or repository."""
    return Path(asked_for).name.replace(".", "_") or "default"


def check_arguments(asked: str, **arguments: Any) -> None:
    """Refuse arguments of ``load_adapter`` that have no meaning for a folder of PEFT.

    Raises:
        CheckpointError: One was given.
    """
    for name, value in arguments.items():
        if value:
            raise CheckpointError(f"{asked}: {name}={value!r} has no meaning for an adapter of PEFT; leave it out.")
