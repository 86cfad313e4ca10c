"""From an adapter of ours to a folder of PEFT."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.models.auto import modeling_auto

from ...configuration import AdapterConfig, ConfigUnion
from ...containers import AdapterDict
from ...convolutions import is_plain
from ...errors import CheckpointError
from ...method import methods_of
from ...methods.bitfit import BiasChange, BitFitConfig
from ...methods.trainable_tokens import TrainableTokensConfig
from ...prompts import PromptSite
from ...sites import LinearSite
from .. import files, heads, weights
from ..files import Content
from .draft import Draft, Options, Tensors, shortest
from .forms import Form
from .loading import PEFT, TASKS
from .reading import TOKENS
from .table import FORMS

if TYPE_CHECKING:
    from torch import nn

    from ...heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin
    from ...model import ModelAdaptersMixin

BESIDE = (BitFitConfig, TrainableTokensConfig)
"""What PEFT has as an option of another method."""
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT expects the head in the file."""
TURNED = ("ADALORA", "BOFT", "FOURIERFT", "HIRA", "IA3", "LORA", "OFT", "RANDLORA", "SHIRA", "VERA")
"""Types that ask whether weights are kept the other way round, as GPT-2 does."""
LINEAR_ONLY = ("BOFT", "BONE", "HRA", "LOHA", "LOKR", "MISS", "OFT", "ROAD", "SHIRA")
"""Types that refuse maps whose weight is kept the other way round."""
VERSION = "0.21.0"
"""The version of PEFT whose format this is."""


def contents_of(
    model: "ModelAdaptersMixin", name: str, config: AdapterConfig, with_head: bool
) -> dict[files.Kind, Content]:
    """What PEFT would save of an adapter, and of the head that was trained with it.

    Raises:
        CheckpointError: PEFT has no such method or option; the message names the field.
    """
    asked = f"save_adapter({name!r}, format='peft')"
    members = list(config.configs) if isinstance(config, ConfigUnion) else [config]
    beside = [member for member in members if len(members) > 1 and isinstance(member, BESIDE)]
    main = [member for member in members if member not in beside]
    if len(main) != 1:
        raise CheckpointError(
            f"{asked}: PEFT has no union of {' and '.join(type(member).__name__ for member in members)}; add them as "
            "adapters of their own and save each."
        )
    model_class = _class_of(model, name)
    headed = model_class != type(model.base_model).__name__
    form, draft = _written(model, name, main[0], asked, headed)
    tensors = dict(_keys(draft, form))
    for member in beside:
        if isinstance(member, BitFitConfig):
            tensors |= _biases(draft, form)
            continue
        own_form, own = _written(model, name, member, asked, headed)
        draft.options["trainable_token_indices"] = own.options["token_indices"]
        ends = {key.removesuffix(".trainable_tokens_delta"): tensor for key, tensor in _keys(own, own_form)}
        tensors |= {key + TOKENS: tensor for key, tensor in ends.items()}
    head = _head(model, name, model_class, asked) if with_head or PromptSite in form.sites else {}
    if taken := [
        site.module_path for site in draft.parts if site.place.outside and f"{site.module_path}.weight" in head
    ]:
        raise CheckpointError(
            f"{asked}: the adapter sits at {taken[0]!r}, and PEFT either adapts a module or saves it whole; pass "
            "with_head=False to save the adapter alone."
        )
    options = _options(model, form, draft, head, model_class)
    return {PEFT: Content(options, tensors | _head_keys(head, form))}


def _written(
    model: "ModelAdaptersMixin", name: str, config: AdapterConfig, asked: str, headed: bool
) -> tuple[Form, Draft]:
    form = next((form for form in FORMS if form.takes(config)), None)
    if form is None:
        raise CheckpointError(
            f"{asked}: PEFT has no counterpart of {type(config).__name__}. Save it in the native format; or merge it "
            "(merge_adapter) and save the model."
        )
    kinds = tuple(methods_of(config))
    parts = {site: _copies(module) for site, module in model.adapter_sites.holding(name) if type(module) in kinds}
    shared = [_copies(module) for module in model.adapter_sites.shared(name).values()]
    fields = {field: config[field] for field in config.field_names()}
    own = {key: value for each in shared for key, value in each.items()}
    draft = Draft(model, asked, name, {}, fields, parts, own, headed=headed)
    form.write(draft)
    for site in draft.parts:
        if site.part:
            raise CheckpointError(
                f"{asked}: the adapter sits at slices of fused projections, such as {site.path!r}, and PEFT's "
                f"{form.peft_type} at whole modules; train it with target_modules, or save it in the native format."
            )
        if isinstance(site, LinearSite) and form.peft_type in LINEAR_ONLY and not is_plain(site.host):
            raise CheckpointError(
                f"{asked}: the module at {site.path!r} is a {type(site.host).__name__}, which PEFT's {form.peft_type} "
                "does not take. Save it in the native format."
            )
    return form, draft


def _biases(draft: Draft, form: Form) -> Tensors:
    """The biases that are trained beside a LoRA, whole ones, by PEFT's keys."""
    draft.options["bias"] = "all"
    if form.peft_type != "LORA":
        raise draft.refusal("bias", f"PEFT trains biases beside LoRA, not beside {form.peft_type}. Save them alone")
    adapted = {site.host for site in draft.parts}
    found: Tensors = {}
    for site, module in draft.model.adapter_sites.holding(draft.name):
        if not isinstance(module, BiasChange):
            continue
        if site.bias is None:
            draft.fields["missing_too"] = True
            raise draft.refusal("missing_too", f"{site.host_path} has no bias, and PEFT adds none. Save it here")
        key = f"base_model.model.{draft.path(site)}.{'base_layer.' if site.host in adapted else ''}bias"
        whole = found.setdefault(key, weights.copied(site.host.get_parameter("bias")))
        whole[site.rows if isinstance(site, LinearSite) else slice(None)] += weights.copied(module.bias).to(whole)
    return found


def _copies(module: "nn.Module") -> Tensors:
    return {key: weights.copied(tensor) for key, tensor in module.state_dict().items()}


def _keys(draft: Draft, form: Form) -> Iterator[tuple[str, Tensor]]:
    """The tensors by PEFT's keys; prompts and prefixes have no path."""
    for site, own in draft.parts.items():
        start = "" if isinstance(site, PromptSite) else f"base_model.model.{draft.path(site)}."
        for parameter, tensor in own.items():
            yield start + parameter, weights.copied(tensor)
    for parameter, tensor in draft.shared.items():
        yield ("" if PromptSite in form.sites else "base_model.") + parameter, weights.copied(tensor)


def _options(model: "ModelAdaptersMixin", form: Form, draft: Draft, head: Tensors, model_class: str) -> Options:
    task = _task(model, model_class)
    if task in WITH_HEAD and not head:
        task = None
    options = {**draft.options, "peft_type": form.peft_type, "peft_version": VERSION}
    options |= {"inference_mode": True, "task_type": task}
    options["base_model_name_or_path"] = model.model_name or None
    if task is None:
        options["auto_mapping"] = {"base_model_class": model_class, "parent_library": type(model.base_model).__module__}
    if PromptSite not in form.sites:
        paths = {draft.path(site) for site in draft.parts}
        whole = "feedforward_modules" in options  # which have to be among them as they are
        options["target_modules"] = sorted(paths) if whole else shortest(paths, _module_paths(model))
    if form.peft_type in TURNED:
        options["fan_in_fan_out"] = any(
            isinstance(site, LinearSite) and not is_plain(site.host) for site in draft.parts
        )
    if head:
        options["modules_to_save"] = sorted({_saved_module(model, key) for key in head})
    return options


def _task(model: "ModelAdaptersMixin", model_class: str) -> str | None:
    """PEFT's name of what a class is for."""
    if model_class == type(model.base_model).__name__ and not model.config.is_encoder_decoder:
        return "FEATURE_EXTRACTION"
    for task, theirs in TASKS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{theirs}_MAPPING_NAMES").values()
        if any(model_class in ([found] if isinstance(found, str) else found) for found in names):
            return task
    return None


def _module_paths(model: "nn.Module", path: str = "") -> Iterator[str]:
    """All modules but those of adapters."""
    for name, module in model.named_children():
        if not isinstance(module, AdapterDict):
            yield f"{path}{name}"
            yield from _module_paths(module, f"{path}{name}.")


def _class_of(model: "ModelAdaptersMixin", name: str) -> str:
    """The class of transformers that the adapter, with the head of its name, is of."""
    if not heads.is_flexible(model):
        return type(model).__name__
    from ...heads.convert import TASKS as KINDS  # the part of heads comes after this one

    kind = model.heads[name].config["head_type"] if name in model.heads else None
    task = next((task for task, offered in KINDS.items() if str(kind).endswith(offered)), None)
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") if task else {}
    return str(names.get(model.config.model_type, type(model.base_model).__name__))


def _head(model: "ModelAdaptersMixin", name: str, model_class: str, asked: str) -> Tensors:
    """The tensors of the head in its class; those of the map onto words if they are trained or were loaded."""
    if heads.is_flexible(model):
        return _named_head(model, name, model_class, asked) if name in model.heads else {}
    content, words = heads.content(model, None), model.get_output_embeddings()
    found = {} if content is None else content.weights
    trained = words is not None and model.model_frozen and any(each.requires_grad for each in words.parameters())
    left_out = {id(each) for key, each in model.named_parameters(remove_duplicate=False) if key not in found}
    left_out |= set() if model.words_are_loaded or trained else heads.words_of(model)
    own = {key for key, each in model.named_parameters() if id(each) not in left_out}
    return {key: tensor for key, tensor in found.items() if key in own}


def _named_head(model: "ModelWithFlexibleHeadsAdaptersMixin", name: str, model_class: str, asked: str) -> Tensors:
    from ...heads.convert import WORD_TYPES, static_head

    config, state = model.heads[name].config, model.heads[name].state_dict(keep_vars=True)
    tied = {id(parameter) for parameter in model.base_model.parameters()}
    if config["head_type"] in WORD_TYPES and all(id(tensor) in tied for tensor in state.values()):
        return {}
    own = static_head(model_class, model.config, model.head_types)
    if own is None or (difference := own.difference(config)):
        reason = f"{model_class} has no such head" if own is None else difference
        raise CheckpointError(
            f"{asked}: the head {name!r} cannot be one of transformers: {reason}; pass with_head=False."
        )
    return {key: weights.copied(state[place]) for key, place in own.keys.items()}


def _saved_module(model: "ModelAdaptersMixin", key: str) -> str:
    """The module of a head's tensor: as large as can be without the map onto words."""
    words, path = model.get_output_embeddings(), key.partition(".")[0]
    whole = words is None or heads.is_flexible(model) or words not in set(model.get_submodule(path).modules())
    return path if whole else key.rpartition(".")[0]


def _head_keys(head: Tensors, form: Form) -> Tensors:
    start = "base_model." if PromptSite in form.sites else "base_model.model."
    return {start + key: tensor for key, tensor in head.items()}
