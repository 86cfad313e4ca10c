"""The adapter options of a training script, and the model set up as they say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..composition import Stack
from ..configuration import AdapterConfig
from ..errors import AdapterError
from ..model import ModelAdaptersMixin


@dataclass
class AdapterArguments:
    """The adapter options of a training script, for ``HfArgumentParser``.

    Example:
        ```python
        parser = HfArgumentParser((TrainingArguments, AdapterArguments))
        training_args, adapter_args = parser.parse_args_into_dataclasses()
        ```
    """

    train_adapter: bool = field(default=False, metadata={"help": "Train an adapter instead of the full model."})
    load_adapter: str | None = field(
        default="", metadata={"help": "Pre-trained adapter to start from: a folder, an URL or a name on the Hub."}
    )
    adapter_config: str | None = field(
        default="seq_bn",
        metadata={"help": "Configuration of a new adapter: a string such as 'lora[r=16]', or the path of a JSON file."},
    )
    load_lang_adapter: str | None = field(
        default=None, metadata={"help": "Pre-trained language adapter to put below the trained one; it stays frozen."}
    )
    lang_adapter_config: str | None = field(
        default=None, metadata={"help": "Kept for command lines of 1.x: the language adapter's own files say it."}
    )


def setup_adapter_training(
    model: PreTrainedModel,
    adapter_args: AdapterArguments,
    adapter_name: str,
    adapter_config_kwargs: Mapping[str, Any] | None = None,
    adapter_load_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str | None, str | None]:
    """Adds or loads the adapter that `adapter_args` describe, freezes the rest, activates it.

    An adapter of that name that the model already has is trained on, unless `load_adapter` replaces its weights. A
    language adapter stands below it in a `Stack` and stays frozen. Heads are left alone: add the head first.

    Args:
        model: An AdapterModel, or a model after `adapters.init`.
        adapter_args: The options; without `train_adapter` nothing is changed.
        adapter_name: Name of the adapter that is trained.
        adapter_config_kwargs: Changes to the configuration of a new adapter; entries that are None do not count.
        adapter_load_kwargs: Passed on to `load_adapter`, for both adapters.

    Returns:
        The names of the trained adapter and of the language adapter, each None if there is none.

    Raises:
        AdapterError: An adapter is to be loaded without `train_adapter`, the model was never initialised for
            adapters, or an adapter does not load; the model then has the adapters it had.

    Example:
        ```python
        model.add_classification_head("mrpc", num_labels=2)
        setup_adapter_training(model, AdapterArguments(train_adapter=True, adapter_config="lora"), "mrpc")
        ```
    """
    if not adapter_args.train_adapter:
        for option in ("load_adapter", "load_lang_adapter"):
            if path := getattr(adapter_args, option):
                raise AdapterError(
                    f"{option}={path!r}: train_adapter is False; adapters are loaded only to train an adapter. "
                    "Pass --train_adapter."
                )
        return None, None
    if not isinstance(model, ModelAdaptersMixin):
        raise AdapterError(
            f"setup_adapter_training({type(model).__name__}): this model knows no adapters; it must be an "
            "AdapterModel or initialised. Call adapters.init(model) first."
        )
    before = set(model.adapters_config)
    try:
        language = _place_adapters(
            model, adapter_args, adapter_name, adapter_config_kwargs or {}, adapter_load_kwargs or {}
        )
    except Exception:
        for name in set(model.adapters_config) - before:
            model.delete_adapter(name)
        raise
    model.train_adapter(adapter_name)
    model.set_active_adapters(Stack(language, adapter_name) if language else adapter_name)
    return adapter_name, language


def _place_adapters(
    model: ModelAdaptersMixin,
    adapter_args: AdapterArguments,
    name: str,
    config_kwargs: Mapping[str, Any],
    load_kwargs: Mapping[str, Any],
) -> str | None:
    """Adds or loads the task adapter and loads the language adapter; returns the latter's name."""
    changes = {key: value for key, value in config_kwargs.items() if value is not None}
    config = AdapterConfig.load(adapter_args.adapter_config or "seq_bn", **changes)
    language = None
    if adapter_args.load_lang_adapter:
        language = model.load_adapter(adapter_args.load_lang_adapter, **load_kwargs)
        if language == name:
            raise AdapterError(
                f"load_lang_adapter={adapter_args.load_lang_adapter!r}: its name is {language!r}, as that of the "
                "trained adapter; they must differ. Save it under another name, or give the task another one."
            )
    if adapter_args.load_adapter:
        model.load_adapter(adapter_args.load_adapter, load_as=name, **load_kwargs)
    elif name not in model.adapters_config:
        model.add_adapter(name, config=config)
    return language
