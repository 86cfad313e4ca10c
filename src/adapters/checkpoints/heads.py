"""Prediction heads in files: the named heads of an ``XAdapterModel``, and the one head of an ordinary model class."""

import logging
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bounds import bounded
from ..errors import AdapterError, CheckpointError, ConfigError, UnknownAdapterError, suggestion, text_of
from . import files, weights
from .files import HEAD, Content, Weights
from .placing import all_or_nothing
from .provenance import full_config, origin
from .weights import OF_ADAPTERS, Slots

if TYPE_CHECKING:
    from ..heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin
    from ..model import ModelAdaptersMixin

logger = logging.getLogger(__name__)

FLEXIBLE_CLASS = re.compile(r"(AdapterModel|ModelWithHeads)$")
"""Classes with named heads; the second name is that of versions 1 and 2."""


def is_flexible(model: "ModelAdaptersMixin") -> "TypeGuard[ModelWithFlexibleHeadsAdaptersMixin]":
    """Whether a model has named heads."""
    from ..heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin  # which imports this module

    return isinstance(model, ModelWithFlexibleHeadsAdaptersMixin)


def save_head(
    model: "ModelAdaptersMixin",
    save_directory: str | os.PathLike[str],
    head_name: str | None = None,
    use_safetensors: bool = True,
) -> None:
    """Writes a head into a folder: all files or none. A model class with one head of its own needs no name.

    Raises:
        UnknownAdapterError: The model has no such head.
        CheckpointError: The folder cannot be written.
    """
    found = content(model, head_name)
    if found is None:
        known = [*model.heads] if is_flexible(model) else []
        raise UnknownAdapterError(
            f"save_head({head_name!r}): Unknown head_name {head_name!r}; {suggestion(head_name or '', known)}"
        )
    files.write(save_directory, {HEAD: found}, use_safetensors)


def load_head(
    model: "ModelAdaptersMixin",
    save_directory: str | os.PathLike[str],
    load_as: str | None = None,
    id2label: Mapping[int, str] | None = None,
    use_safetensors: bool = True,
    set_active: bool = True,
    loading_info: dict[str, Any] | None = None,
    undo: ExitStack | None = None,
) -> tuple[str, str | None]:
    """Reads a head from a folder into the model; returns the folder and the head's name, None for a model's own head.

    Args:
        load_as: The name in this model; by default the one it was saved under.
        id2label: Labels in place of the saved ones.
        loading_info: Receives the lists ``missing_keys`` and ``unexpected_keys``.
        undo: The enclosing load of a setup.

    Raises:
        CheckpointError: The files are missing, broken or not for this class of model, which is as it was.
    """
    folder = text_of("load_head(save_directory)", save_directory)
    asked = f"load_head({folder!r})"
    head = fitted(model, read_head(Path(folder), load_as, id2label, use_safetensors), load_as)
    if isinstance(head, str):
        raise CheckpointError(f"{asked}: {head}")
    with all_or_nothing(model, undo) as changes:
        place_head(model, head, asked, set_active, loading_info, changes)
    return str(save_directory), head.name


def content(model: "ModelAdaptersMixin", name: str | None) -> Content | None:
    """What is saved of the head of that name, or of the model's own head; None if there is no such head."""
    if is_flexible(model):
        if name is None or name not in model.heads:
            return None
        tensors, config = _slots(model, name), full_config(model, name, model.heads[name].config, {})
    else:
        tensors = _slots(model, None)
        if not tensors:
            return None
        labels = {"num_labels": model.config.num_labels, "label2id": model.config.label2id}
        config = full_config(model, None, None, labels)
    return Content(config, {key: weights.copied(parts[0]) for key, parts in tensors.items()})


@dataclass(frozen=True)
class SavedHead:
    """What a head's folder says: its name in the model (None for a model's own head), config, tensors, config file."""

    name: str | None
    config: Mapping[str, Any] | None
    weights: Weights
    file: Mapping[str, Any]


def read_head(
    folder: Path, load_as: str | None, id2label: Mapping[int, str] | None, use_safetensors: bool
) -> SavedHead:
    """Reads the folder of a head; touches no model.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    file = folder / HEAD.config
    full = files.read_json(file)
    saved, config, old = files.read_weights(folder, HEAD, use_safetensors), full.get("config"), full.get("name")
    labels = None if id2label is None else numbered(f"{str(file)!r}: id2label", id2label)
    if config is None:
        _check_labels(full, file)
        return SavedHead(None, None, saved, full if labels is None else {**full, "label2id": labels})
    name = load_as or old
    if not isinstance(config, dict) or not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{str(file)!r}: 'config' or 'name' is not that of a head. Pass load_as to name it, or save it again."
        )
    if labels is not None:
        number = config.get("num_labels", config.get("num_choices", len(labels)))
        if len(labels) != number:
            raise AdapterError(
                f"{str(file)!r}: id2label has {len(labels)} labels, the saved head {number}; give as many."
            )
        config = {**config, "label2id": labels}
    _check_labels(config, file)
    own = f"heads.{old}."
    tensors = {f"heads.{name}.{key.removeprefix(own)}": value for key, value in saved.items() if key.startswith(own)}
    return SavedHead(name, config, tensors, full)


def numbered(asked: str, id2label: Any) -> dict[str, int]:
    """The numbers of labels.

    Raises:
        ConfigError: It is no mapping from numbers to labels.
    """
    try:
        return {label: int(index) for index, label in id2label.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{asked}={id2label!r}: it must be a dict from numbers to labels ({error}).") from error


def _check_labels(config: Mapping[str, Any], file: Path) -> None:
    labels = config.get("label2id")
    if labels is not None and not (isinstance(labels, dict) and all(isinstance(i, int) for i in labels.values())):
        raise CheckpointError(f"{str(file)!r}: 'label2id' is {labels!r}; it must map each label to its number.")


def beside_adapter(
    model: "ModelAdaptersMixin",
    folder: Path,
    adapter_name: str,
    load_as: str | None,
    id2label: Mapping[int, str] | None,
    use_safetensors: bool,
) -> SavedHead | None:
    """The head in an adapter's folder; None if there is none, or, with a warning, if it is not for this class of model.

    Raises:
        CheckpointError: A file is broken.
    """
    if not (folder / HEAD.config).is_file():
        return None
    if not is_flexible(model) and not _slots(model, None):
        return None
    head = fitted(model, read_head(folder, load_as, id2label, use_safetensors), adapter_name)
    if isinstance(head, str):
        warnings.warn(f"load_adapter: the head saved with {adapter_name!r} is left out: {head}", stacklevel=4)
        return None
    return head


def fitted(model: "ModelAdaptersMixin", head: SavedHead, name: str | None) -> SavedHead | str:
    """The head as one of this class of model, where it is named `name` if it has no name of its own; or why not."""
    saved, here = str(head.file.get("model_class")), type(model).__name__
    if is_flexible(model) and head.config is None:
        return _as_named(model, head, name, saved)
    if is_flexible(model):
        fits = FLEXIBLE_CLASS.search(saved) is not None
        return head if fits else f"Cannot automatically convert prediction head of model class {saved} to flex head."
    if head.config is not None:
        return _as_own(model, head, saved, here)
    if saved != here:
        return f"Model class {saved!r} of found prediction head does not match current model class {here!r}."
    return head


def _as_named(
    model: "ModelWithFlexibleHeadsAdaptersMixin", head: SavedHead, name: str | None, saved: str
) -> SavedHead | str:
    """The head of one of transformers' classes, as a named one."""
    from ..heads.convert import static_head  # the part of heads comes after this one

    own = static_head(saved, model.config, model.head_types)
    if own is None:
        return f"Cannot automatically convert prediction head of model class {saved} to flex head; load it there."
    if name is None:
        return "Could not identify a name for the prediction head to be loaded. Please specify 'load_as'."
    config = own.config(head.file.get("label2id") or _labels(model, own.rows(head.weights)))
    return SavedHead(name, config, own.weights(head.weights, name), head.file)


def _labels(model: "ModelAdaptersMixin", number: int | None) -> Mapping[str, int]:
    """The labels of the model's config, or, if it has another number of them, as many as there are scores in a file."""
    own: Mapping[str, int] = model.config.label2id
    return own if number in (None, len(own)) else {f"LABEL_{index}": index for index in range(number or 0)}


def _as_own(model: "ModelAdaptersMixin", head: SavedHead, saved: str, here: str) -> SavedHead | str:
    """A named head, as that of one of transformers' classes."""
    from ..heads.convert import TASKS, read_head, task_of

    config, task = head.config or {}, task_of(here, tuple(TASKS.values()))
    own = None if task is None else read_head(cast(PreTrainedModel, model), task[1])
    if own is None or (difference := own.difference(config)):
        reason = f"no head of an AdapterModel is like that of {here}" if own is None else difference
        return (
            f"Model class {saved!r} of found prediction head does not match current model class {here!r}, and "
            f"{reason}. Load it into an AutoAdapterModel."
        )
    file = {**head.file, "label2id": config.get("label2id")}
    live = {key: parts[0] for key, parts in _slots(model, None).items()}
    return SavedHead(None, None, own.own_weights(head.weights, head.name or "", live), file)


def place_head(
    model: "ModelAdaptersMixin",
    head: SavedHead,
    asked: str,
    set_active: bool,
    loading_info: dict[str, Any] | None,
    undo: ExitStack,
) -> None:
    """Adds or overwrites a head; closing `undo` takes it back.

    Weights that are tied to the base model stay the base model's.

    Raises:
        CheckpointError: The tensors do not fit.
    """
    if is_flexible(model) and head.name is not None:
        with bounded(asked, head.config, head.weights):
            _add(model, head.name, head.config or {}, undo)
        if set_active:
            model.active_head = head.name
    elif labels := head.file.get("label2id"):
        model.config.label2id = labels
        model.config.id2label = {index: label for label, index in labels.items()}
    slots = _slots(model, head.name)
    tied = _tied_to_base(model, slots)
    needed = {key: parts for key, parts in slots.items() if key in head.weights or key not in tied}
    fit = weights.compare(needed, head.weights, (), "", asked, origin(head.file, model))
    own = {key: value for key, value in fit.matched.items() if key not in tied}
    before = {key: slots[key][0].detach().clone() for key in own}
    undo.callback(weights.fill, slots, before)
    weights.fill(slots, own)
    undo.callback(setattr, model, "words_are_loaded", model.words_are_loaded)
    model.words_are_loaded |= not words_of(model).isdisjoint(id(slots[key][0]) for key in own)
    _warn_of_other_embeddings(slots, {key: fit.matched[key] for key in tied & fit.matched.keys()}, asked)
    weights.report(fit, asked, loading_info)


def words_of(model: "ModelAdaptersMixin") -> set[int]:
    """The identities of the parameters of the map onto words."""
    words = model.get_output_embeddings()
    return set() if words is None else {id(parameter) for parameter in words.parameters()}


def _add(model: "ModelWithFlexibleHeadsAdaptersMixin", name: str, config: Mapping[str, Any], undo: ExitStack) -> None:
    """Makes the head, unless there is one of that name and config, whose parameters then stay the same objects."""
    old = dict(model.heads.items()).get(name)
    if old is not None:
        logger.warning("Overwriting existing head %r.", name)
        if old.config == config:
            return
    try:
        new = model.head_from_config(name, config, overwrite_ok=True)
    except AdapterError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"head {name!r}: its saved config cannot be used: {error}. Save it again.") from error
    model.add_prediction_head(new, overwrite_ok=True, set_active=False)
    if old is None:
        undo.callback(model.delete_head, name)
    else:
        undo.callback(model.add_prediction_head, old, overwrite_ok=True, set_active=False)


def _slots(model: "ModelAdaptersMixin", name: str | None) -> Slots:
    """The tensors of the head of that name, or of the model's own head, by file key; none if it has no head."""
    if is_flexible(model):
        own = model.heads[name or ""].state_dict(keep_vars=True)
        return {f"heads.{name}.{key}": (tensor,) for key, tensor in own.items()}
    from ..heads.convert import TASKS, task_of

    backbone = {model.base_model_prefix}
    if model.base_model is model:  # a base model, or one of T5's relatives, whose parts have no attribute in common
        if task_of(type(model).__name__, tuple(TASKS.values())) is None:
            return {}
        backbone = {path for path, part in model.named_children() if isinstance(part, (PreTrainedModel, nn.Embedding))}
    state = {key: (tensor,) for key, tensor in model.state_dict(keep_vars=True).items() if not OF_ADAPTERS.search(key)}
    return {key: parts for key, parts in state.items() if key.partition(".")[0] not in backbone}


def tied_weights(model: "ModelAdaptersMixin", name: str | None) -> set[str]:
    """The keys of a head's tensors that are weights of the base model too."""
    return _tied_to_base(model, _slots(model, name))


def _tied_to_base(model: "ModelAdaptersMixin", slots: Slots) -> set[str]:
    """The keys of a head's tensors that are parameters of the base model too."""
    inside = (lambda key: key.startswith("heads.")) if is_flexible(model) else slots.__contains__
    base = {id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False) if not inside(key)}
    return {key for key, parts in slots.items() if id(parts[0]) in base}


def _warn_of_other_embeddings(slots: Slots, tied: Mapping[str, Tensor], asked: str) -> None:
    for key, saved in tied.items():
        here = slots[key][0]
        if not torch.equal(saved.to(here), here):
            warnings.warn(
                f"{asked}: {key!r} in the file differs from the embeddings that it is tied to here, which stay. "
                "Outputs will differ: load the base model that the head was trained with.",
                stacklevel=5,
            )
