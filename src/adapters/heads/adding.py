"""The add_*_head methods."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar

from torch import nn

from ..errors import AdapterError, ConfigError, check_type, listing
from ..model import ModelAdaptersMixin
from .base import PredictionHead, UnknownHeadTypeError, label_ids
from .registry import MODEL_HEAD_MAP

# Names that torch gives to members of nn.ModuleDict cannot name a child of it.
RESERVED_NAMES = frozenset(dir(nn.ModuleDict()))


class HeadAdder(ModelAdaptersMixin):
    """Adds heads by type, by config or as objects; part of ModelWithFlexibleHeadsAdaptersMixin.

    Class attributes:
        head_types: The built-in head types that the architecture offers.
        custom_heads: Head classes of the user by identifier. Set it on the class to load a saved model with such
            heads; ``register_custom_head`` sets it for one model.
    """

    head_types: ClassVar[tuple[str, ...]] = ()
    custom_heads: Mapping[str, Callable[..., PredictionHead]] = {}
    heads: MutableMapping[str, PredictionHead]

    @abstractmethod
    def add_prediction_head(self, head: PredictionHead, overwrite_ok: bool = False, set_active: bool = True) -> None:
        """Adds a head that was made before."""

    def add_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
    ) -> None:
        """Adds and activates a head for sequence classification, with ``num_labels=1`` for regression.

        Args:
            multilabel: The labels do not exclude each other; labels are ``(b, num_labels)`` of 0 and 1.
            use_pooler: Read the base model's pooler instead of the sentence vector.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.
            ConfigError: An argument has a value that no head can have.

        Example:
            >>> model.add_classification_head("mrpc", num_labels=2, id2label={0: "no", 1: "yes"})
        """
        head_type = "multilabel_classification" if multilabel else "classification"
        settings: dict[str, Any] = {
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
        }
        self._add(head_type, head_name, overwrite_ok, id2label=id2label, use_pooler=use_pooler, **settings)

    def add_image_classification_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
    ) -> None:
        """Adds and activates a head for image classification.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.
            ConfigError: An argument has a value that no head can have.

        Example:
            >>> model.add_image_classification_head("beans", num_labels=3)
        """
        settings: dict[str, Any] = {
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
        }
        settings |= {"multilabel": multilabel, "id2label": id2label, "use_pooler": use_pooler}
        self._add("image_classification", head_name, overwrite_ok, **settings)

    def add_multiple_choice_head(
        self,
        head_name: str,
        num_choices: int = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
    ) -> None:
        """Adds and activates a head that chooses among ``num_choices`` inputs, ``(b, num_choices, s)``.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.
            ConfigError: An argument has a value that no head can have.

        Example:
            >>> model.add_multiple_choice_head("copa", num_choices=2)
        """
        settings: dict[str, Any] = {
            "num_choices": num_choices,
            "layers": layers,
            "activation_function": activation_function,
        }
        self._add("multiple_choice", head_name, overwrite_ok, id2label=id2label, use_pooler=use_pooler, **settings)

    def add_tagging_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
    ) -> None:
        """Adds and activates a head that labels each token.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.
            ConfigError: An argument has a value that no head can have.

        Example:
            >>> model.add_tagging_head("ner", num_labels=3, id2label={0: "O", 1: "B", 2: "I"})
        """
        settings: dict[str, Any] = {
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
        }
        self._add("tagging", head_name, overwrite_ok, id2label=id2label, **settings)

    def add_qa_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
    ) -> None:
        """Adds and activates a head for extractive question answering.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.
            ConfigError: An argument has a value that no head can have.

        Example:
            >>> model.add_qa_head("squad")
        """
        settings: dict[str, Any] = {
            "num_labels": num_labels,
            "layers": layers,
            "activation_function": activation_function,
        }
        self._add("question_answering", head_name, overwrite_ok, id2label=id2label, **settings)

    def add_dependency_parsing_head(
        self,
        head_name: str,
        num_labels: int = 2,
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
    ) -> None:
        """Adds and activates a head for dependency parsing; the model is given ``word_starts`` then.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.
            ConfigError: An argument has a value that no head can have.

        Example:
            >>> model.add_dependency_parsing_head("ud", num_labels=37)
            >>> model(**tokens, word_starts=starts).arc_preds.argmax(dim=-1)
        """
        self._add("dependency_parsing", head_name, overwrite_ok, id2label=id2label, num_labels=num_labels)

    def add_masked_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        overwrite_ok: bool = False,
    ) -> None:
        """Adds and activates a head for masked language modeling, tied to the input embeddings if the model ties.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.

        Example:
            >>> model.add_masked_lm_head("mlm")
        """
        self._add("masked_lm", head_name, overwrite_ok, layers=layers, activation_function=activation_function)

    def add_causal_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        overwrite_ok: bool = False,
    ) -> None:
        """Adds and activates a head for causal language modeling, tied to the input embeddings if the model ties.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.

        Example:
            >>> model.add_causal_lm_head("clm", layers=1, activation_function=None)
        """
        settings: dict[str, Any] = {
            "layers": layers,
            "activation_function": activation_function,
            "layer_norm": True,
            "bias": True,
        }
        self._add("causal_lm", head_name, overwrite_ok, **settings)

    def add_seq2seq_lm_head(self, head_name: str, layers: int = 1, overwrite_ok: bool = False) -> None:
        """Adds and activates a head for sequence-to-sequence language modeling.

        Raises:
            AdapterError: The architecture offers no such head, or the name is taken.

        Example:
            >>> model.add_seq2seq_lm_head("summaries")
        """
        self._add("seq2seq_lm", head_name, overwrite_ok, layers=layers)

    def register_custom_head(self, identifier: str, head_class: type[PredictionHead]) -> None:
        """Makes a head class of the user known to this model under an identifier.

        Raises:
            ConfigError: It is no subclass of PredictionHead, or the identifier is a built-in head type.

        Example:
            >>> model.register_custom_head("mean", MeanHead)
        """
        if not (inspect.isclass(head_class) and issubclass(head_class, PredictionHead)):
            raise ConfigError(
                f"register_custom_head({identifier!r}): {head_class!r} is no head class; "
                "pass a subclass of PredictionHead."
            )
        if identifier in MODEL_HEAD_MAP:
            raise ConfigError(
                f"register_custom_head({identifier!r}): this is a built-in head type; choose another identifier."
            )
        self.custom_heads = {**self.custom_heads, identifier: head_class}

    def add_custom_head(
        self, head_type: str, head_name: str, overwrite_ok: bool = False, set_active: bool = True, **kwargs: Any
    ) -> None:
        """Adds a head of a registered class; ``kwargs`` go to its constructor.

        Raises:
            UnknownHeadTypeError: The type is not registered.
            AdapterError: The name is taken.

        Example:
            >>> model.add_custom_head("mean", "my_head", num_labels=3)
        """
        if head_type not in self.custom_heads:
            raise UnknownHeadTypeError(
                f"add_custom_head({head_type!r}, {head_name!r}): the given head has a head_type that is not registered "
                f"as a custom head yet; registered are {listing(self.custom_heads)}. "
                f"Register it first with register_custom_head({head_type!r}, YourHead)."
            )
        self._check_name(head_name, overwrite_ok)
        head = self.custom_heads[head_type](self, head_name, **kwargs)
        head.config["head_type"] = head_type
        self.add_prediction_head(head, overwrite_ok, set_active)

    def add_prediction_head_from_config(
        self, head_name: str, config: Mapping[str, Any], overwrite_ok: bool = False, set_active: bool = True
    ) -> None:
        """Adds a head as ``head.config`` or ``head_config.json`` describe it; the config is not changed.

        Raises:
            UnknownHeadTypeError: The type is neither built in nor registered.
            ConfigError: The config has a key that the head does not take.
            AdapterError: The name is taken.

        Example:
            >>> model.add_prediction_head_from_config("ner", {"head_type": "tagging", "num_labels": 3, "layers": 1})
        """
        head = self.head_from_config(head_name, config, overwrite_ok)
        self.add_prediction_head(head, overwrite_ok, set_active)

    def head_from_config(self, head_name: str, config: Mapping[str, Any], overwrite_ok: bool) -> PredictionHead:
        """Makes the head that a config describes, without adding it."""
        check_type(f"head {head_name!r}: config", config, Mapping, "a dict, as head.config is")
        settings = dict(config)
        head_type, label2id = settings.pop("head_type", None), settings.pop("label2id", None)
        if label2id is not None:
            settings.setdefault("id2label", {index: label for label, index in label2id.items()})
        known: dict[str, Callable[..., PredictionHead]] = {**MODEL_HEAD_MAP, **self.custom_heads}
        if head_type not in known:
            raise UnknownHeadTypeError(
                f"add_prediction_head_from_config({head_name!r}): Given head type {head_type!r} is not known; known "
                f"are {listing(known)}. Please register this head type before loading the model."
            )
        self._check_name(head_name, overwrite_ok)
        try:
            inspect.signature(known[head_type]).bind(self, head_name, **settings)
        except TypeError as error:
            raise ConfigError(f"head {head_name!r} of type {head_type!r}: {error}; correct its config.") from None
        head = known[head_type](self, head_name, **settings)
        head.config["head_type"] = head_type
        return head

    def _add(
        self,
        head_type: str,
        head_name: str,
        overwrite_ok: bool,
        id2label: Mapping[int, str] | None = None,
        **settings: Any,
    ) -> None:
        if head_type not in self.head_types:
            raise AdapterError(
                f"add head {head_name!r}: This model of type {self.config.model_type!r} does not support head type "
                f"{head_type!r}; it supports {listing(self.head_types)}."
            )
        outputs = settings.get("num_labels", settings.get("num_choices"))
        label2id = label_ids(id2label)
        if label2id is not None and len(label2id) != outputs:
            raise ConfigError(
                f"add head {head_name!r}: id2label has {len(label2id)} different labels, but the head "
                f"has {outputs} outputs; the numbers must be equal."
            )
        config = {"head_type": head_type, "label2id": label2id, **settings}
        self.add_prediction_head_from_config(head_name, config, overwrite_ok)

    def _check_name(self, name: str, overwrite_ok: bool) -> None:
        if not isinstance(name, str) or not name or "." in name or name in RESERVED_NAMES:
            raise AdapterError(
                f"add head {name!r}: this cannot name a module of torch; use a name without '.' that is no member of "
                "nn.ModuleDict."
            )
        if name in self.heads and not overwrite_ok:
            raise AdapterError(
                f"add head {name!r}: Model already contains a head with name {name!r}. "
                "Use overwrite_ok=True to force overwrite."
            )
