"""From a folder of PEFT, or its model, to an adapter of ours."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...bounds import bounded
from ...configuration import AdapterConfig, ConfigUnion
from ...errors import CheckpointError
from ...method import methods_of
from ...methods.bitfit import BitFitConfig
from ...norms import NormSite
from ...sites import LinearSite, Site
from ...vocabulary import LookupSite
from .. import names
from ..placing import Saved
from .draft import Draft, Options, Tensors, sites_by_path, some
from .forms import Form
from .table import form_of_type

if TYPE_CHECKING:
    from ...model import ModelAdaptersMixin

PREFIXES = ("base_model.model.", "base_model.")
TOKENS = ".token_adapter.trainable_tokens_delta"
KNOWN = re.compile(
    r"\w*(_config|init|tokens_id|ia3_weights)\w*|(encoder|layers|megatron|num|prefix|prompt_tuning|save|tokenizer)_\w+"
    r"|(cpt|opt)_\w+|(alpha|rank)_pattern|(target|exclude)_(modules|parameters)|\w*sparse|auto_mapping|base_model_name_or_path|bias"
    r"|fan_in_fan_out|feedforward_modules|inference_mode|mask_type|mini_r|modules_to_save|peft_(type|version)"
    r"|projection_prng_key|qalora_group_size|r|revision|task_type|token_dim|trainable_token_indices"
    r"|use_effective_conv2d|lora_(alpha|dropout|bias)|use_(rslora|dora)"
)
"""Options that say how an adapter was made, where modules are, or what the tensors tell too."""


@dataclass
class Parts:
    """The tensors of a file, sorted.

    Attributes:
        rest: Those that belong to no module of the method.
    """

    sites: dict[Site, Tensors] = field(default_factory=dict)
    shared: Tensors = field(default_factory=dict)
    rest: Tensors = field(default_factory=dict)


def read(
    model: "ModelAdaptersMixin", options: Options, tensors: Mapping[str, Tensor], name: str, asked: str, alone: bool
) -> tuple[Saved[AdapterConfig], Tensors]:
    """An adapter of PEFT as one of ours, and the tensors of a head by their keys; the model is looked at only.

    Args:
        options: What its ``adapter_config.json`` holds.
        tensors: What its weights file holds.
        name: What it will be called.
        asked: The call, for messages.
        alone: The model has the weights that it had before PEFT came.

    Raises:
        CheckpointError: An option, or a module, has no counterpart here.
    """
    form = form_of_type(asked, str(options.get("peft_type")))
    _warn_of_unknown(form, options, asked)
    own = {_stripped(key): tensor for key, tensor in tensors.items() if ".original_module." not in key}
    parts = _sorted(model, form, own, options, asked)
    draft = Draft(model, asked, name, options, {}, parts.sites, parts.shared, alone)
    if not parts.sites and not parts.shared:
        raise CheckpointError(f"{asked}: the file has no tensors of {form.peft_type}, but {some(own)}. Save it again.")
    try:
        with bounded(asked, options, tensors):
            form.read(draft)
        members = [(draft, form.config), *_biases(draft, parts.rest), *_tokens(draft, parts.rest)]
        _check_embeddings(draft, parts.rest)
        configs = [kind(**member.fields) for member, kind in members]
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:  # AdapterError is a ValueError
        raise CheckpointError(f"{asked}: adapter_config.json cannot be used: {error}") from error
    weights = [_keyed(member, config) for (member, _), config in zip(members, configs, strict=True)]
    config = configs[0] if len(configs) == 1 else ConfigUnion(*configs)
    saved = Saved(name, config, {key: tensor for each in weights for key, tensor in each.items()}, {})
    return saved, parts.rest


def _warn_of_unknown(form: Form, options: Options, asked: str) -> None:
    known = {*form.options, *form.unused}
    unknown = {key: value for key, value in options.items() if value and key not in known and not KNOWN.fullmatch(key)}
    if unknown:
        warnings.warn(f"{asked}: the options {unknown} of PEFT are not known here and have no effect.", stacklevel=6)


def _stripped(key: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix).replace(".modules_to_save.", ".")


def _sorted(model: "ModelAdaptersMixin", form: Form, tensors: Tensors, options: Options, asked: str) -> Parts:
    """The tensors by site."""
    own = re.compile(rf"(?:(.+)\.)?({'|'.join(map(re.escape, form.tensors))})(_topk_\w+)?")
    index, prefix = sites_by_path(model, form.sites), f"{model.base_model_prefix}."
    parts, missing = Parts(), set()
    for key, tensor in tensors.items():
        found = own.fullmatch(key) if not key.endswith(TOKENS) else None
        if key in form.shared:
            parts.shared[key] = tensor
        elif found is None:
            parts.rest[key] = tensor
        else:
            path = found[1] or ""
            site = index.get(path) or index.get(path.removeprefix(prefix))
            site = site if path else next(iter(index.values()), None)  # a prompt
            if site is None and not _is_second(key, tensors):
                missing.add(path)
            elif site is None:
                continue
            else:
                parts.sites.setdefault(site, {})[found[2] + (found[3] or "")] = tensor
    if missing:
        option = "target_parameters" if options.get("target_parameters") else "target_modules"
        raise CheckpointError(
            f"{asked}: {option}={options.get(option)!r} cannot be mapped; {type(model).__name__} has no place for "
            f"{form.peft_type} at {some(missing)}. Load it into the class of model that it is of, or merge it in PEFT."
        )
    return parts


def _is_second(key: str, tensors: Tensors) -> bool:
    """Whether a tensor is that of trained tokens once more: PEFT writes it for a tied map onto words too."""
    end = ".trainable_tokens_delta"
    others = (tensor for other, tensor in tensors.items() if other != key and other.endswith(end))
    return key.endswith(end) and any(torch.equal(tensors[key], tensor) for tensor in others)


def _keyed(draft: Draft, config: AdapterConfig) -> Tensors:
    """The tensors by the keys of our files."""
    kinds = {method.site_type: method for method in methods_of(config)}
    found = {}
    for site, own in draft.parts.items():
        path = names.container_path(draft.model.config.model_type, site)
        for parameter, tensor in own.items():
            container = kinds[type(site)].container
            found[".".join(filter(None, (path, container, draft.name, parameter)))] = tensor
    for parameter, tensor in draft.shared.items():
        found[f"{methods_of(config)[0].shared_container}.{draft.name}.{parameter}"] = tensor
    return found


def _biases(draft: Draft, rest: Tensors) -> list[tuple[Draft, type[AdapterConfig]]]:
    """With ``bias``, PEFT trains biases of the model: those of LoRA's maps become LoRA's, the others are BitFit's."""
    if draft.options.get("bias", "none") == "none":
        return []
    index = sites_by_path(draft.model, (LinearSite, NormSite))
    prefix, others = f"{draft.model.base_model_prefix}.", dict[Site, Tensors]()
    for key in [key for key in rest if key.endswith(".bias")]:
        path = key.removesuffix(".bias").removesuffix(".base_layer")
        site = index.get(path) or index.get(path.removeprefix(prefix))
        if site is None or site.place.outside or site.bias is None:
            continue
        change = rest.pop(key) - site.bias.detach().cpu()
        if site in draft.parts:
            _add_bias(draft, site, change)
        elif change.any():
            others[site] = {"bias": change}
    if any("bias" in own for own in draft.parts.values()):
        draft.fields["lora_bias"] = True
        for own in draft.parts.values():
            own.setdefault("bias", torch.zeros(len(own["lora_B"])))
    if not others:
        return []
    linears = sorted(site.module_path for site in others if isinstance(site, LinearSite))
    norms = any(isinstance(site, NormSite) for site in others)
    fields = {"norms": norms, "target_modules": linears or None}
    fields |= {} if linears else dict.fromkeys(("attention", "intermediate", "output"), False)
    return [(Draft(draft.model, draft.asked, draft.name, {}, fields, others), BitFitConfig)]


def _add_bias(draft: Draft, site: Site, change: Tensor) -> None:
    own = draft.parts[site]
    if draft.fields.get("use_dora"):
        raise draft.refusal("bias", "DoRA has none here. Save the adapter with bias='none'")
    from .lora import scale_of

    own["bias"] = own.get("bias", torch.zeros_like(change)) + change / scale_of(draft, site)


def _tokens(draft: Draft, rest: Tensors) -> list[tuple[Draft, type[AdapterConfig]]]:
    """Trainable tokens beside another method."""
    keys = [key for key in rest if key.endswith(TOKENS)]
    if not keys:
        return []
    chosen = draft.options["trainable_token_indices"]
    (table,) = draft.model.adapter_sites.of(LookupSite)
    path = keys[0].removesuffix(TOKENS)
    wanted = {draft.path(table), table.module_path}
    if len(keys) > 1 or path not in wanted:
        raise draft.refusal("trainable_token_indices", "only the embeddings of the input can be changed so")
    indices = next(iter(chosen.values())) if isinstance(chosen, Mapping) else chosen
    form = form_of_type(draft.asked, "TRAINABLE_TOKENS")
    parts: dict[Site, Tensors] = {table: {"trainable_tokens_delta": rest.pop(keys[0])}}
    own = Draft(draft.model, draft.asked, draft.name, {"token_indices": indices}, {}, parts)
    form.read(own)
    return [(own, form.config)]


def _check_embeddings(draft: Draft, rest: Tensors) -> None:
    """Where embeddings have an adapter PEFT saves them too: they have to be the model's."""
    kept = [key for key in rest if key.endswith((".base_layer.weight", ".base_layer.bias"))]
    state: dict[str, Any] = dict(draft.model.named_parameters()) if kept else {}
    for key in kept:
        path = key.replace(".base_layer.", ".")
        here = state.get(path, state.get(path.removeprefix(f"{draft.model.base_model_prefix}.")))
        if here is None or here.shape != rest[key].shape or not torch.equal(here.cpu(), rest[key].to(here.dtype)):
            raise draft.refusal(
                "target_modules", f"the file has its own weights for {path!r}, which are not those of this model"
            )
        del rest[key]
