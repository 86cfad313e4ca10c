"""Heads of transformers' own model classes, such as ``BertForSequenceClassification``, as named heads and back.

What such a head consists of is read off its class: the names and shapes of its layers, and whether there is a pooler.
The tables have what the layers do not show: activations without a module, and the classes that compute something else.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from ..errors import ConfigError
from .base import hidden_size

TASKS = {
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq_lm",
    "SPEECH_SEQ_2_SEQ": "seq2seq_lm",
    "SEQUENCE_CLASSIFICATION": "classification",
    "MULTIPLE_CHOICE": "multiple_choice",
    "TOKEN_CLASSIFICATION": "tagging",
    "QUESTION_ANSWERING": "question_answering",
    "MASKED_LM": "masked_lm",
    "CAUSAL_LM": "causal_lm",
    "IMAGE_CLASSIFICATION": "image_classification",
}
"""transformers' names of tasks, each with the type of the head."""
WORD_TYPES = ("masked_lm", "causal_lm", "seq2seq_lm")
TOKEN_TYPES = ("tagging", "question_answering")

ACTIVATIONS = {
    r"(classifier|classification_head|qa_outputs)\.dense": "tanh",
    r"pre_classifier": "relu",
    r"pooler\.dense": "=pooler_hidden_act",
    r"classifier\.linear_hidden": "tanh",
    r"lm_head\.dense": "gelu",
    r"vocab_transform": "=activation",
}
"""The activation behind a layer, or ``=`` and the field of the config that names it, where no module shows it."""
ACTIVATIONS_OF_TYPES = {
    kind: {r"classifier\.dense": "=hidden_act"}
    for kind in ("big_bird", "convbert", "mra", "nystromformer", "roformer", "yoso")
}
"""The same for the model types that have another one there."""

DIFFERENT = {
    r"(MT5|T5|UMT5)ForQuestionAnswering": "reads hidden states that T5's heads scale by d^-0.5",
    r"(ConvBert|RoFormer)ForMultipleChoice": "reads the last token",
    r"(EuroBert|IJepa)For.*Classification": "reads a mean",
    r"(Data2VecVision|Gte|NomicBert)For.*Classification": "reads a pooler that the base model has not",
    r"Funnel.*": "has a base model without a decoder",
    r"Longformer.*": "gives the first token global attention",
    r"XLNet(ForSequenceClassification|ForMultipleChoice|LMHeadModel)": "reads padding, and shifts no labels",
    r"(Esm|NomicBert)ForMaskedLM": "has a bias or a tie that these layers do not show",
    r"(BailingHybrid|FalconH1|HYV4)ForCausalLM": "scales its scores, or renames its base model's weights",
    r"SeamlessM4T.*": "has an encoder and decoder of its own, chosen by what it is given",
    r"(Marian|MiniCPM3|ProphetNet|Esmc|Inkling|T5Gemma|Lxmert).*": "has more to it than these layers",
}
"""Classes of which the layers look like those of a named head, and what else they do."""
SCALES = re.compile(r"final_logit_softcapping|logits_soft_cap|logit_scale|logits_scaling|lm_head_multiplier")
"""Fields of configs by which some models scale or cap the scores of words."""


@dataclass(frozen=True)
class StaticHead:
    """The head of a model class, as a named one.

    Attributes:
        model_class: The class's name.
        settings: The config of the named head, but for its labels.
        keys: ``<index>.<parameter>`` in the named head, for each key of the class's state dict.
        prefix: The attribute of the class that has its base model; empty if it has none.
    """

    model_class: str
    settings: Mapping[str, Any]
    keys: Mapping[str, str]
    prefix: str

    def config(self, labels: Mapping[str, int] | None) -> dict[str, Any]:
        """The config of the named head, with these labels."""
        kind = self.settings["head_type"]
        if kind in WORD_TYPES or labels is None:
            return {**self.settings, "label2id": None}
        if kind == "question_answering":
            return {**self.settings, "num_labels": 2, "label2id": dict(labels) if len(labels) == 2 else None}
        number = "num_choices" if kind == "multiple_choice" else "num_labels"
        return {**self.settings, number: len(labels), "label2id": dict(labels)}

    def weights(self, file: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The tensors of a file of the class, as those of the named head; what has no place in it stays, unless 0."""
        found = {f"heads.{name}.{place}": file[key] for key, place in self.keys.items() if key in file}
        return {key: each for key, each in file.items() if key not in self.keys and each.any()} | found

    def rows(self, file: Mapping[str, Tensor]) -> int | None:
        """How many scores a head in a file of the class has; None where that is not the number of its labels."""
        last = max(self.keys.values(), key=lambda place: int(place.partition(".")[0])).partition(".")[0]
        found = [len(file[key]) for key, place in self.keys.items() if key in file and place == f"{last}.weight"]
        return found[0] if found and self.settings["head_type"] != "multiple_choice" else None

    def own_weights(self, file: Mapping[str, Tensor], name: str, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The opposite: the tensors of a file of the named head, as those of the class, which has the `live` ones."""
        places = {key: f"heads.{name}.{place}" for key, place in self.keys.items() if key in live}
        found = {key: file[place] for key, place in places.items() if place in file}
        strange = {key: each for key, each in file.items() if key not in places.values()}
        return {key: torch.zeros_like(live[key]) for key in live.keys() - places.keys()} | strange | found

    def difference(self, config: Mapping[str, Any]) -> str | None:
        """What a named head of this config computes in another way; None if nothing."""
        without = ["dropout_prob", "vocab_size", "embedding_size"]
        without += ["activation_function"] if self.settings["layers"] == 1 else []  # it stands between two layers
        for key, value in self.settings.items():
            if key not in without and config.get(key, value) != value:
                return f"its {key} is {config.get(key)!r}, that of {self.model_class} is {value!r}"
        return None


def task_of(model_class: str, offered: tuple[str, ...]) -> tuple[str, str] | None:
    """transformers' name of the task that a model class is for, and the type of the head; None if none is offered."""
    for task, kind in TASKS.items():
        if kind in offered and model_class in _class_names(task):
            return task, kind
    return None


@cache
def _class_names(task: str) -> frozenset[str]:
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    return frozenset(name for each in names for name in ([each] if isinstance(each, str) else each))


def static_head(model_class: str, config: PreTrainedConfig, offered: tuple[str, ...]) -> StaticHead | None:
    """The head of a model class of the config's architecture, given its name; None if no named head computes the same.

    A head of the same task of a like architecture counts as the architecture's own, as RoBERTa's for XLM-R.
    """
    found = task_of(model_class, offered)
    mapping = {} if found is None else getattr(modeling_auto, f"MODEL_FOR_{found[0]}_MAPPING")
    if found is None or type(config) not in mapping:
        return None
    entry = mapping[type(config)]
    classes = entry if isinstance(entry, tuple) else (entry,)
    own = next((each for each in classes if each.__name__ == model_class), classes[0])
    with torch.device("meta"), no_init_weights():
        model = own(copy.deepcopy(config))
    model.tie_weights()
    return read_head(model, found[1])


def read_head(model: PreTrainedModel, kind: str) -> StaticHead | None:
    """The head of a model as a named one of a type; None if no named head computes the same."""
    name, problem = type(model).__name__, model.config.problem_type
    prefix = "" if model.base_model is model else model.base_model_prefix
    if problem == "multi_label_classification" and kind == "classification":
        kind = "multilabel_classification"
    layers: list[tuple[str, nn.Module]] = [
        (path, part) for path, part in _parts(model) if [*part.parameters()] and not [*part.children()]
    ]
    linears = [(path, module) for path, module in layers if isinstance(module, nn.Linear)]
    norms = [module for _, module in layers if isinstance(module, nn.LayerNorm)]
    expected = len(linears) - 1 if kind in WORD_TYPES else 0
    if len(norms) != expected or len(linears) + len(norms) != len(layers) or _computes_more(model, kind):
        return None
    if not _fit(model, kind, [linear for _, linear in linears]):
        return None
    activation = _activation(model, linears[0][0]) if len(linears) == 2 else None
    settings: dict[str, Any] = {"head_type": kind, "layers": len(linears), "activation_function": activation}
    settings |= _settings(model, kind, len(linears), linears[-1][1])
    modules: list[nn.Module] = [*(linear for _, linear in linears[:-1]), *norms, linears[-1][1]]
    keys = _keys(model, modules, _indices(kind, len(modules), activation))
    return None if keys is None else StaticHead(name, settings, keys, prefix)


def _computes_more(model: PreTrainedModel, kind: str) -> bool:
    """Whether a class is known to do something that a named head does not, or its config says so."""
    config = model.config
    if any(re.fullmatch(pattern, type(model).__name__) for pattern in DIFFERENT):
        return True
    if kind in WORD_TYPES:
        scales = (value for field, value in vars(config.get_text_config()).items() if SCALES.fullmatch(field))
        return any(value not in (None, 1.0) for value in scales)
    return config.problem_type == "regression" and len(config.id2label or ()) > 1


def _fit(model: PreTrainedModel, kind: str, linears: list[nn.Linear]) -> bool:
    """Whether a named head can have these linear maps: one, or two with the model's width between."""
    try:
        width = hidden_size(model.config)
    except ConfigError:
        return False
    if len(linears) not in (1, 2) or linears[0].in_features != width:
        return False
    inner = width if len(linears) == 1 else linears[0].out_features
    if linears[-1].in_features != inner or (inner != width and kind not in WORD_TYPES):
        return False
    unbiased = [linear for linear in linears if not _has_bias(linear)]
    return not unbiased or (unbiased == linears[-1:] and kind not in (*TOKEN_TYPES, "multiple_choice"))


def _has_bias(linear: nn.Linear) -> bool:
    return "bias" in dict(linear.named_parameters())


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules outside of the base model."""
    for name, child in model.named_children():
        if not isinstance(child, (PreTrainedModel, nn.Embedding)) and child is not model.base_model:
            yield from child.named_modules(prefix=name)


def _activation(model: PreTrainedModel, path: str) -> str | None:
    """The name of the activation behind the layer at a path; None if there is none."""
    activations: list[tuple[str, Any]] = [*ACT2CLS.items()]
    known = {(kind[0] if isinstance(kind, tuple) else kind): name for name, kind in reversed(activations)}
    shown: list[str] = [known[type(module)] for _, module in _parts(model) if type(module) in known]
    if shown:
        return shown[0]
    rules = ACTIVATIONS_OF_TYPES.get(model.config.model_type, {}) | ACTIVATIONS
    rule = next((rule for pattern, rule in rules.items() if re.fullmatch(pattern, path)), None)
    if rule is None or not rule.startswith("="):
        return rule
    named: str | None = getattr(model.config, rule[1:])
    return named


def _settings(model: PreTrainedModel, kind: str, layers: int, output: nn.Linear) -> dict[str, Any]:
    """What else the config of a named head says."""
    if kind in WORD_TYPES:
        found = {"layer_norm": layers == 2, "bias": _has_bias(output), "vocab_size": output.out_features}
        return found if kind == "seq2seq_lm" else {**found, "embedding_size": output.in_features}
    dropouts = [module.p for _, module in _parts(model) if isinstance(module, nn.Dropout)]
    settings: dict[str, Any] = {"dropout_prob": dropouts[-1] if dropouts else 0.0}
    if kind in TOKEN_TYPES:
        return settings
    pools = layers == 1 and any(name == "pooler" for name, _ in model.base_model.named_children())
    settings |= {"use_pooler": pools}
    if kind == "image_classification":
        settings["multilabel"] = model.config.problem_type == "multi_label_classification"
    return settings if kind == "multiple_choice" else {**settings, "bias": _has_bias(output)}


def _indices(kind: str, modules: int, activation: str | None) -> list[int]:
    """Where the layers with parameters stand in the named head."""
    if kind in WORD_TYPES:
        return [0] if modules == 1 else [0, 1 + bool(activation), 2 + bool(activation)]
    return [1] if modules == 1 else [1, 3 + bool(activation)]


def _keys(model: PreTrainedModel, modules: list[nn.Module], indices: list[int]) -> dict[str, str] | None:
    """Where each parameter stands in the named head, by all of its names if it is tied; None if one has no place."""
    places = {
        id(parameter): f"{index}.{name}"
        for module, index in zip(modules, indices, strict=True)
        for name, parameter in module.named_parameters()
    }
    paths = {path for path, _ in _parts(model)}
    own = {
        key: parameter
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if key.rpartition(".")[0] in paths
    }
    # BERT's models have the bias of the last layer twice, and without ties do not use one of the two
    size = modules[-1].get_parameter("weight").shape[:1]
    if any(id(each) not in places and each.shape != size for each in own.values()):
        return None
    return _with_saved_names(model, {key: places[id(each)] for key, each in own.items() if id(each) in places})


def _with_saved_names(model: PreTrainedModel, keys: dict[str, str]) -> dict[str, str]:
    """The same with the names that transformers saves the parameters under, which for some models are others."""
    saved = {
        name: place
        for key, place in keys.items()
        for name in revert_weight_conversion(model, {key: model.get_parameter(key)})
    }
    return saved | keys
