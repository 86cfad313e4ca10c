"""Reading a folder of PEFT: the adapter, and the head that was trained with it."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.models.auto import modeling_auto

from ...configuration import AdapterConfig
from ...errors import CheckpointError
from .. import files, heads
from ..heads import SavedHead
from ..placing import Saved
from .draft import Options, Tensors, some
from .reading import read

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


def is_peft(config: Mapping[str, Any]) -> bool:
    """Whether this is the config file of an adapter of PEFT; the native format has one of the same name."""
    return "peft_type" in config


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


def read_folder(
    model: "ModelAdaptersMixin",
    folder: Path,
    options: Options,
    asked: str,
    name: str,
    with_head: bool,
    id2label: Mapping[int, str] | None,
    use_safetensors: bool,
) -> tuple[Saved[AdapterConfig], SavedHead | None]:
    """The adapter and, where there is one for this class of model, the head; touches no model.

    Args:
        options: What its config file holds.
        asked: The call, for messages.
        name: What the adapter is called in the model.

    Raises:
        CheckpointError: The folder is broken, or cannot be mapped; the message names the option.
    """
    saved, head = read(model, options, files.read_weights(folder, PEFT, use_safetensors), name, asked, alone=True)
    return saved, head_of(model, head, options, name, asked, id2label) if with_head else None


def head_of(
    model: "ModelAdaptersMixin",
    tensors: Tensors,
    options: Options,
    name: str,
    asked: str,
    id2label: Mapping[int, str] | None = None,
) -> SavedHead | None:
    """The tensors of PEFT's ``modules_to_save`` as the model's own head or a named one.

    Raises:
        CheckpointError: Some are of the base model.
    """
    if not tensors:
        return None
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.base_model.named_children()} if model.base_model is not model else set()
    if within := [key for key in tensors if key.startswith(prefix) or key.partition(".")[0] in parts]:
        raise CheckpointError(
            f"{asked}: modules_to_save={options.get('modules_to_save')!r} cannot be mapped; {some(within)} are weights "
            "of the base model, which adapters leave alone here. Merge the adapter in PEFT."
        )
    labels = None if id2label is None else {label: index for index, label in id2label.items()}
    found: SavedHead | str = f"{type(model).__name__} has no {some(tensors)}"
    if heads.is_flexible(model):
        file = {"model_class": _class_of(model, options), "label2id": labels}
        found = heads.fitted(model, SavedHead(None, None, tensors, file), name)
    elif (own := heads.content(model, None)) is not None and tensors.keys() <= own.weights.keys():
        file = {"model_class": type(model).__name__, "label2id": labels}
        found = SavedHead(None, None, own.weights | tensors, file)  # what PEFT has not saved stays
    if isinstance(found, str):
        warnings.warn(f"{asked}: the head is left out: {found}.", stacklevel=5)
        return None
    return found


def _class_of(model: "ModelAdaptersMixin", options: Options) -> str:
    """The name of the class of model that an adapter was made on."""
    known: Mapping[str, str] = options.get("auto_mapping") or {}
    task = TASKS.get(str(options.get("task_type")))
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") if task else {}
    return str(known.get("base_model_class", names.get(model.config.model_type)))
