"""Which model a checkpoint is of: what its config file says, and whether another model may load it."""

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING

from .. import __version__
from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin

logger = logging.getLogger(__name__)


def full_config(
    model: "ModelAdaptersMixin", name: str | None, config: Mapping[str, Any] | None, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a config file: `config`, where it comes from, and `extra` keys, which replace none of these."""
    return {**extra, "config": config, "name": name, "version": f"adapters.{__version__}", **_identity(model)}


def _identity(model: "ModelAdaptersMixin") -> dict[str, Any]:
    return {
        "hidden_size": hidden_size(model),
        "model_class": type(model).__name__,
        "model_name": model.config.name_or_path,
        "model_type": model.config.model_type,
    }


def hidden_size(model: "ModelAdaptersMixin") -> int | None:
    """The width of the model; None if its config states no single one."""
    try:
        return int(model.config.hidden_size)
    except AttributeError:
        return None


def origin(config: Mapping[str, Any], model: "ModelAdaptersMixin") -> str:
    """What the checkpoint is of, where its config says so, and what the model is, as the end of a sentence."""
    here = _identity(model)
    form = "a {model_class} (model_type {model_type!r}, hidden_size {hidden_size})"
    known = {key: config.get(key, "unknown") for key in here}
    saved = f"the checkpoint is of {form.format(**known)}, " if "model_type" in config else ""  # PEFT's say nothing
    return f"{saved}this model is {form.format(**here)}."


def prefixes(config: Mapping[str, Any], keys: Iterable[str], model: "ModelAdaptersMixin") -> list[str]:
    """What the keys of a file may start with before the path inside the base model.

    This model's prefix; and whatever is there if the file is of the same architecture, because model classes of one
    architecture name their base model differently.
    """
    found = [f"{model.base_model_prefix}."]
    if config.get("model_type") == model.config.model_type:
        found += sorted({f"{key.partition('.')[0]}." for key in keys} - {*found})
    return found


def check_architecture(config: Mapping[str, Any], keys: Iterable[str], model: "ModelAdaptersMixin", asked: str) -> None:
    """Refuses a file of another architecture whose tensors fit by chance, as BERT's fit RoBERTa.

    Architectures with one prefix, such as RoBERTa and XLM-RoBERTa, exchange files.

    Raises:
        CheckpointError: The architectures differ.
    """
    saved, here = config.get("model_type"), model.config.model_type
    if saved is None or saved == here:
        return
    if not any(key.startswith(f"{model.base_model_prefix}.") for key in keys):
        other = _prefix_of_type(saved)
        if other is not None and other != model.base_model_prefix:
            raise CheckpointError(f"{asked}: {origin(config, model)} Load it into a {saved!r} model.")
    logger.warning("%s: %s Its weights fit, but they were trained for another model.", asked, origin(config, model))


def _prefix_of_type(model_type: str) -> str | None:
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        return None
    found: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    prefix: str = (found[0] if isinstance(found, tuple) else found).base_model_prefix
    return prefix
