"""Writing a model with adapters in its weights as a plain model of transformers, which knows nothing of adapters."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from .checkpoints.heads import is_flexible
from .composition import Setup, Stack, parse_composition
from .containers import AdapterDict
from .errors import AdapterError, listing
from .heads.convert import TASKS, read_head
from .heads.dispatch import HeadPlan
from .quantised import is_quantised
from .saving import save_model

if TYPE_CHECKING:
    from .heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin
    from .model import ModelAdaptersMixin

MULTILABEL = "multilabel_classification"


def save_merged(
    model: ModelAdaptersMixin, folder: str | os.PathLike[str], adapter_setup: Any, head_name: str | None, **kwargs: Any
) -> None:
    """See ``ModelAdaptersMixin.save_merged``."""
    if not is_flexible(model) and head_name is not None:
        raise AdapterError(
            f"save_merged(head_name={head_name!r}): {type(model).__name__} has one head of its own and no named ones; "
            "leave head_name out."
        )
    with model.adapter_sites.merging(_setup(model, adapter_setup)):
        if is_flexible(model):
            save_model(folder, _plain_model(model, head_name).save_pretrained, **kwargs)
        else:
            save_plain: Any = partial(PreTrainedModel.save_pretrained, model)
            save_model(folder, save_plain, state_dict=_plain_state(model), **kwargs)


def _setup(model: ModelAdaptersMixin, asked: Any) -> Setup:
    """What is asked for, else what is in the weights, else what is active."""
    sites = model.adapter_sites
    if asked is None:
        merged, active = sites.merged, model.active_adapters
        if merged is not None and active is not None and not active.flatten() <= Stack(merged).flatten():
            raise AdapterError(
                f"save_merged: {merged} is in the weights and {active} is active; name what is to be saved, with "
                "adapter_setup."
            )
        if merged is None and active is not None and sites.skip_layers:
            raise AdapterError(
                f"save_merged: the active setup skips the layers {sorted(sites.skip_layers)}; weights skip none. Name "
                "what is to be saved, in all layers, with adapter_setup."
            )
        asked = active if merged is None else merged
    setup = parse_composition(asked)
    if setup is None:
        raise AdapterError(
            "save_merged: no adapter is active; name what is to be saved, with adapter_setup, of "
            f"{listing(model.adapters_config)}."
        )
    model._check_names("save_merged", setup)
    return setup.first() if setup == Stack(setup.first()) else setup


def _plain_state(model: Any) -> dict[str, Tensor]:
    """The state dict of a model without its adapters."""
    held = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, AdapterDict))
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(held)}


def _plain_model(model: ModelWithFlexibleHeadsAdaptersMixin, head_name: str | None) -> PreTrainedModel:
    """A model of one of transformers' classes with the weights of `model`, of which there is no copy."""
    name = _head(model, head_name)
    if any(map(is_quantised, model.modules())):
        raise AdapterError(
            "save_merged: a quantised XAdapterModel cannot be written as another class; load the checkpoint with the "
            "AutoModel… class of the task and adapters.init."
        )
    config: PreTrainedConfig = copy.deepcopy(model.config)
    vars(config).pop("prediction_heads")
    if name is None:
        plain, state = _empty(model.base_class, config), _plain_state(model.base_model)
    else:
        plain, state = _with_head(model, name, config)
    base, places = f"{plain.base_model_prefix}.", plain.state_dict().keys()
    state = {key: tensor for key, tensor in state.items() if key in places or not key.startswith(base)}  # a pooler
    missing, unexpected = plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    unfilled = [key for key in missing if plain.get_parameter(key).is_meta]
    if unfilled or unexpected:
        raise AdapterError(
            f"save_merged: {type(plain).__name__} needs {listing(unfilled)} and has no place for "
            f"{listing(unexpected)}; train the head in that class, after adapters.init, to save it so."
        )
    if plain.can_generate() and model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def _head(model: ModelWithFlexibleHeadsAdaptersMixin, asked: str | None) -> str | None:
    names = [asked] if asked is not None else list(HeadPlan.of(model.active_head).names)
    if len(names) > 1 or any(name not in model.heads for name in names):
        raise AdapterError(
            f"save_merged: a plain model has one head, not {listing(names)}; name one with head_name, of "
            f"{listing(model.heads)}."
        )
    return names[0] if names else None


def _with_head(
    model: ModelWithFlexibleHeadsAdaptersMixin, name: str, config: PreTrainedConfig
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """An empty model of the class whose head computes what the head of that name does, and its weights."""
    head = model.heads[name]
    kind = str(head.config.get("head_type"))
    if kind == MULTILABEL:
        config.problem_type = "multi_label_classification"
    if labels := head.config.get("label2id"):
        config.label2id, config.id2label = labels, {number: label for label, number in labels.items()}
    between = ("activation_function", "layer_norm") if head.config.get("layers") == 1 else ()
    computed = {key: value for key, value in head.config.items() if key not in between}
    reasons = []
    for cls in _classes(config, kind):
        plain = _empty(cls, config)
        static = read_head(plain, kind)
        reason = f"{cls.__name__} computes something else" if static is None else static.difference(computed)
        if static is None or reason is not None:
            reasons.append(str(reason))
            continue
        whole, own = _plain_state(model), plain.base_model_prefix + "."
        base = {key: tensor for key, tensor in whole.items() if not key.startswith("heads.")}
        heads = {key: tensor for key, tensor in whole.items() if key.startswith(f"heads.{name}.")}
        live = {
            key: torch.empty_like(tensor, device="cpu", dtype=model.dtype)
            for key, tensor in plain.state_dict().items()
            if not key.startswith(own)
        }
        return plain, base | static.own_weights(heads, name, live)
    raise AdapterError(
        f"save_merged(head_name={name!r}): transformers has no class for {type(model).__name__} with this head"
        f"{': ' if reasons else ''}{'; '.join(reasons)}. Add a head with the settings of one of its classes, or save "
        "the base model, with active_head = None."
    )


def _classes(config: PreTrainedConfig, kind: str) -> Iterator[type[PreTrainedModel]]:
    """transformers' classes for a type of head."""
    for task, known in TASKS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
        if known == (kind if kind != MULTILABEL else "classification") and type(config) in mapping:
            found = mapping[type(config)]
            yield from found if isinstance(found, tuple) else (found,)


def _empty(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"), no_init_weights():
        plain: PreTrainedModel = cls(config)
    plain.tie_weights()
    plain.eval()
    return plain
