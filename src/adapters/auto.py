"""``XAdapterModel`` for every architecture that ``AutoModel`` knows, from one factory, and ``AutoAdapterModel``.

``from adapters import BertAdapterModel`` makes the class of the config class ``BertConfig`` when it is first asked for.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs

from .checkpoints import whole
from .checkpoints.atomic import finish
from .errors import AdapterError, listing
from .heads.convert import StaticHead, static_head
from .heads.language_modeling import CausalLMHead
from .heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin
from .heads.registry import offered_head_types
from .wrap import generation_methods, in_forward_context

SUFFIX = "AdapterModel"
DEFAULT_HEAD = "default"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Encoder-decoders first: transformers also has a causal language model of the decoder of some of them.
GENERATIVE_MAPPINGS = (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)


class FlexibleAdapterModel(ModelWithFlexibleHeadsAdaptersMixin):
    """What every ``XAdapterModel`` is: a base model under its usual attribute, with adapters and heads."""

    base_class: ClassVar[type[PreTrainedModel]]
    _load_pretrained_model = staticmethod(whole.load_weights)

    def __init__(self, config: PreTrainedConfig, static: StaticHead | None = None) -> None:
        """static: the head of the checkpoint that is being loaded, which becomes the one named ``default``."""
        super().__init__(config)
        if static is not None:
            config.prediction_heads = {DEFAULT_HEAD: static.config(cast("dict[str, int] | None", config.label2id))}
        setattr(self, self.base_model_prefix, self.base_class(config))
        self.init_heads()
        self.post_init()
        self.init_adapters()  # last, because post_init would initialise the adapters' layers as the model's own

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; the head of a checkpoint of one of transformers' own classes is named ``default``.

        Example:
            >>> model = BertAdapterModel.from_pretrained("textattack/bert-base-uncased-SST-2")
            >>> model.active_head
            'default'
        """
        finish(Path(pretrained_model_name_or_path or ""))
        static = cls._static_head(pretrained_model_name_or_path, config, kwargs)
        if static is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        renamed = {f"^{re.escape(key)}$": f"heads.{DEFAULT_HEAD}.{place}" for key, place in static.keys.items()}
        if static.prefix:
            renamed[rf"^{static.prefix}\."] = f"{cls.base_model_prefix}."
        loaded = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            key_mapping={**(kwargs.pop("key_mapping", None) or {}), **renamed},
            static=static,
            **kwargs,
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        del model._weight_conversions  # or the head would be saved under the names of the class that it came from
        return loaded

    @classmethod
    def _static_head(cls, path: Any, config: Any, arguments: Mapping[str, Any]) -> StaticHead | None:
        """The head of the class that a checkpoint is of."""
        if not isinstance(config, PreTrainedConfig):
            where = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
            config = cls.config_class.from_pretrained(path if config is None else config, **where)
        classes = [*(config.architectures or ())]
        named = vars(config).get("prediction_heads")
        return static_head(classes[0], config, cls.head_types) if len(classes) == 1 and not named else None

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.base_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.base_class._can_set_experts_implementation()


class GenerativeAdapterModel(FlexibleAdapterModel):
    """An ``XAdapterModel`` that generates while a language modeling head is active."""

    generate_in_context: Callable[..., Any]

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates tokens with the active causal or sequence-to-sequence language modeling head.

        Raises:
            AdapterError: Another kind of head is active, or none.

        Example:
            >>> model.add_causal_lm_head("clm")
            >>> model.generate(**tokenizer("Adapters are", return_tensors="pt"))
        """
        plan = self._plan(kwargs.get("head"))
        wrong = [n for n in plan.names if not (isinstance(h := self.heads[n], CausalLMHead) and h.generative)]
        if wrong or not plan.names:
            raise AdapterError(
                f"generate: the heads in use are {listing(plan.names)}; generation needs a causal_lm or seq2seq_lm "
                "head. Add one with add_causal_lm_head or add_seq2seq_lm_head, or set active_head."
            )
        return self.generate_in_context(inputs, *args, **kwargs)


@cache
def adapter_model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The ``XAdapterModel`` of a config class ``XConfig``; the same class at every call.

    Raises:
        KeyError: ``AutoModel`` has no base model for this config class.
    """
    base_class = _first_class(MODEL_MAPPING, config_class)
    abstract = _abstract_class(base_class)
    language_model = _language_model(config_class)
    generation = _generation_mixin(language_model)
    name = config_class.__name__.removesuffix("Config") + SUFFIX
    namespace = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{base_class.__name__} with adapters and any number of named prediction heads.",
        "base_class": base_class,
        "base_model_prefix": base_class.base_model_prefix or "model",
        "config_class": base_class.config_class,
        "forward": _forward(base_class),
        **_inputs(base_class),
    }
    encoder_decoder = "decoder_input_ids" in namespace["forward_parameters"]
    namespace["head_types"] = offered_head_types(config_class, encoder_decoder, base_class.main_input_name)
    if encoder_decoder:
        namespace["prepare_decoder_input_ids_from_labels"] = _shift(language_model)
    if generation:
        methods = generation_methods(generation)
        namespace |= {"generate_in_context": methods.pop("generate"), **methods}
    bases = (GenerativeAdapterModel, abstract, generation) if generation else (FlexibleAdapterModel, abstract)
    return type(name, bases, namespace)


def _abstract_class(base_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The architecture's class without a forward, such as ``BertPreTrainedModel``."""
    parents = [parent for parent in base_class.__mro__[1:] if issubclass(parent, PreTrainedModel)]
    return next((parent for parent in parents if parent.forward is torch.nn.Module.forward), PreTrainedModel)


def _first_class(mapping: Any, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    found = mapping[config_class]
    kind: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return kind


def _language_model(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    known = (mapping for mapping in GENERATIVE_MAPPINGS if config_class in mapping)
    return next((_first_class(mapping, config_class) for mapping in known), None)


def _generation_mixin(language_model: type[PreTrainedModel] | None) -> type[GenerationMixin] | None:
    """The generation methods of the architecture's language model: ``GenerationMixin`` or its own variant of it."""
    parents = [] if language_model is None else language_model.__mro__
    mixins = [parent for parent in parents if issubclass(parent, GenerationMixin)]
    return next((mixin for mixin in mixins if not issubclass(mixin, PreTrainedModel)), None)


def _inputs(base_class: type[PreTrainedModel]) -> dict[str, Any]:
    names = tuple(p.name for p in _parameters(base_class) if p.kind is p.POSITIONAL_OR_KEYWORD)
    return {"forward_parameters": names, "_base_inputs": frozenset(names) | TransformersKwargs.__optional_keys__}


def _parameters(base_class: type[PreTrainedModel]) -> list[inspect.Parameter]:
    return list(inspect.signature(base_class.forward).parameters.values())[1:]


def _forward(base_class: type[PreTrainedModel]) -> Callable[..., Any]:
    """A forward with the base model's signature, where the Trainer and ``generate`` read the names of the inputs."""

    def forward(self: FlexibleAdapterModel, *args: Any, **kwargs: Any) -> Any:
        return FlexibleAdapterModel.forward(self, *args, **kwargs)

    signature = inspect.signature(FlexibleAdapterModel.forward)
    first, *rest = signature.parameters.values()
    own = [parameter for parameter in rest if parameter.kind is not parameter.VAR_POSITIONAL]
    base = [p for p in _parameters(base_class) if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "return_dict"]
    forward.__signature__ = signature.replace(parameters=[first, *base, *own])  # type: ignore[attr-defined]
    return in_forward_context(forward)


def _shift(language_model: type[PreTrainedModel] | None) -> Callable[..., torch.Tensor]:
    """How the architecture makes decoder inputs from labels; collators for sequence-to-sequence tasks call it too."""
    method = "prepare_decoder_input_ids_from_labels"
    return vars(language_model).get(method, shift_right) if language_model else shift_right


def shift_right(self: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """The labels shifted right by one, after the decoder's start token, ``(b, s)``.

    Raises:
        AdapterError: The config has no start token.
    """
    if self.config.decoder_start_token_id is None:
        raise AdapterError(
            "forward: there are no decoder inputs, and config.decoder_start_token_id, with which they would start, is "
            "None. Pass decoder_input_ids or set it."
        )
    shifted = labels.roll(1, dims=-1)
    shifted[..., 0] = self.config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, self.config.pad_token_id)


class AdapterModelMapping(Mapping[type[PreTrainedConfig], type[PreTrainedModel]]):
    """The ``XAdapterModel`` of each config class that ``AutoModel`` knows, made on demand."""

    def __getitem__(self, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
        return adapter_model_class(config_class)  # type: ignore[arg-type]

    def __contains__(self, config_class: object) -> bool:
        return isinstance(config_class, type) and config_class in MODEL_MAPPING

    def __iter__(self) -> Iterator[type[PreTrainedConfig]]:
        return iter(MODEL_MAPPING)

    def __len__(self) -> int:
        return len(MODEL_MAPPING)


ADAPTER_MODEL_MAPPING = AdapterModelMapping()


class AutoAdapterModel(_BaseAutoModelClass):
    """Makes the ``XAdapterModel`` that fits a checkpoint or a config.

    ``from_pretrained`` takes any checkpoint of the architecture: a base model's, one with a head of transformers' own,
    which becomes the head ``default``, or one that an ``XAdapterModel`` saved, with its adapters and heads.

    Example:
        >>> model = AutoAdapterModel.from_pretrained("bert-base-uncased")
        >>> model.add_adapter("sst2")
        >>> model.add_classification_head("sst2", num_labels=2)
        >>> model.train_adapter("sst2")
    """

    _model_mapping: Any = ADAPTER_MODEL_MAPPING


def class_names() -> list[str]:
    """The names of all ``XAdapterModel``, without making them."""
    names = (
        config.removesuffix("Config") for kind, config in CONFIG_MAPPING_NAMES.items() if kind in MODEL_MAPPING_NAMES
    )
    return sorted({f"{name}{SUFFIX}" for name in names})


def __dir__() -> list[str]:
    """All public names, for completion."""
    return sorted({*globals(), *class_names()})


def __getattr__(name: str) -> type[PreTrainedModel]:
    """``BertAdapterModel`` and its like, by name: for imports and for pickle."""
    config_name = name.removesuffix(SUFFIX) + "Config"
    if name.endswith(SUFFIX):
        kinds = [CONFIG_MAPPING[kind] for kind, config in CONFIG_MAPPING_NAMES.items() if config == config_name]
        registered = [kind for kind in CONFIG_MAPPING._extra_content.values() if kind.__name__ == config_name]
        for kind in [*kinds, *registered]:
            if kind in ADAPTER_MODEL_MAPPING:
                return adapter_model_class(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
