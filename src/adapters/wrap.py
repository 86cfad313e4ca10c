"""``adapters.init``: one subclass for each model class, made once, whose forward opens the context of a pass."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Cache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils.hub import cached_file

from .checkpoints import peft, whole
from .checkpoints.atomic import finish
from .composition import Block, MultiTask
from .configuration.model_adapters_config import ModelAdaptersConfig
from .context import START, AdapterSetup, Forward, Record, generating, state, within
from .described import bases_of, give_config, unchanged_on_failure
from .errors import AdapterError, CompositionError, check_type, text_of
from .evaluation import check_batch, check_growing
from .interface import INTERFACE_FILE, AdapterModelInterface
from .model import ModelAdaptersMixin
from .repetition import batch_size, repeat_inputs, repeated
from .reports import with_record

CONTEXT_ARGUMENTS = (
    "output_adapter_gating_scores",
    "output_adapter_fusion_attentions",
    "adapter_input_parallelized",
    "task_ids",
    "adapter_names",
)
LOADING = {"_load_pretrained_model": staticmethod(whole.load_weights)}
_CLASSES: dict[tuple[type, tuple[type, ...]], type] = {}


def init(
    model: Any, adapters_config: ModelAdaptersConfig | None = None, interface: Any = None
) -> PreTrainedModel | None:
    """Give a transformers model support for adapters, in place. Its outputs do not change.

    interface: an ``AdapterModelInterface``, a dict of its fields or the folder it was saved to, for a model that the
    rules do not read as you would, and for a module of torch that is no model of transformers.

    Returns:
        None; the model itself if it already had support; for a ``PeftModel`` the model in it, with PEFT's adapters.

    Raises:
        AdapterError: `model` is not a transformers model and not described, the description does not fit it, or an
            adapter of PEFT cannot be taken over.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")
        >>> adapters.init(model)
        >>> model.add_adapter("sst-2")
    """
    if isinstance(model, ModelAdaptersMixin):
        return cast(PreTrainedModel, model)
    if peft.is_wrapped(model):
        return cast(PreTrainedModel, peft.take_over(model))
    interface = AdapterModelInterface.of(interface)
    if not isinstance(model, PreTrainedModel) and (interface is None or not isinstance(model, nn.Module)):
        raise AdapterError(
            f"adapters.init({type(model).__name__}): it is no transformers model; give a PreTrainedModel, such as "
            "AutoModel.from_pretrained returns, or describe a module of torch with interface=AdapterModelInterface(…)."
        )
    base = getattr(model, "base_model", model)
    if interface is not None:
        base = interface.base_of(model)
        interface.check(base)
    parts = [part for part in model.modules() if part is not base]
    if any(map(peft.is_wrapped, parts)):
        raise AdapterError(
            f"adapters.init({type(model).__name__}): it has modules of PEFT inside, which would act whatever is active "
            "here; give the PeftModel itself, or a model without them and load PEFT's folder with load_adapter."
        )
    inside = [part for part in parts if isinstance(part, ModelAdaptersMixin)]
    if any(part.has_adapters() for part in inside):
        raise AdapterError(
            f"adapters.init({type(model).__name__}): a part of it, {type(inside[0]).__name__}, has adapters of its "
            "own; initialise the whole model first and add the adapters then."
        )
    if isinstance(model, PreTrainedModel) and vars(model.config).get("adapters") and adapters_config is None:
        warnings.warn(
            f"adapters.init({type(model).__name__}): the checkpoint has adapters, of which from_pretrained read no "
            "weights; they are made anew. Read them with adapters.load_model(path, model_class).",
            stacklevel=2,
        )
    with unchanged_on_failure(base, model):
        if interface is not None:
            give_config(model, base, interface)
        ModelAdaptersMixin.init_adapters(cast(ModelAdaptersMixin, model), adapters_config, interface)
    return None


def init_adapters_config(
    model: ModelAdaptersMixin, model_config: Any, adapters_config: ModelAdaptersConfig | None = None
) -> None:
    """Give a model, and its base model, a registry of adapters: the given one, the one in its config, or a new one."""
    listed = vars(model_config).get("adapters")
    configured = adapters_config or ModelAdaptersConfig(**(listed or {}))
    model.adapters_config = configured
    cast(Any, model.base_model).adapters_config = configured


def load_model(
    model_name_or_path: str, model_class: Any, interface: Any = None, *model_args: Any, **kwargs: Any
) -> PreTrainedModel:
    """``model_class.from_pretrained`` for what ``save_pretrained`` of a model with adapters wrote, here or in 1.x.

    Example:
        >>> model = adapters.load_model("folder", BertForSequenceClassification)
    """
    finish(Path(text_of("load_model(model_name_or_path)", model_name_or_path)))
    check_type("load_model(model_class)", model_class, type, "a class, such as BertModel or AutoModel")
    interface = AdapterModelInterface.of(_saved_interface(model_name_or_path) if interface is None else interface)
    if issubclass(model_class, _BaseAutoModelClass):
        config = kwargs.get("config") or AutoConfig.from_pretrained(model_name_or_path)
        model_class = model_class._model_mapping[type(config)]

    if issubclass(model_class, Swapped):
        model_class = model_class._plain_class

    def build(self: Any, config: Any, *args: Any, **arguments: Any) -> None:
        model_class.__init__(self, config, *args, **arguments)
        ModelAdaptersMixin.init_adapters(self, interface=interface)

    building: Any = type(model_class.__name__, (model_class,), {**_names(model_class), "__init__": build, **LOADING})
    loaded: Any = building.from_pretrained(model_name_or_path, *model_args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
    model.__class__ = adapted_class(model_class, type(model)._added)
    return cast(PreTrainedModel, loaded)


def _saved_interface(path: Any) -> Any:
    """The file with the interface that a model was saved with; None if there is none."""
    wanted = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)
    return cached_file(path, INTERFACE_FILE, **{f"_raise_exceptions_for_{name}": no for name, no in wanted.items()})


def enable(model: Any, interface: AdapterModelInterface | None = None) -> None:
    """Swap a model's class for the one with adapters."""
    if not isinstance(model, ModelAdaptersMixin):
        model.__class__ = adapted_class(type(model), () if interface is None else bases_of(model))
        if interface is not None:
            model.adapter_interface = interface
        if "_old_forward" in vars(model):  # accelerate keeps the forward that it wrapped
            model._old_forward = type(model).forward.__get__(model)


def adapted_class(cls: type, added: tuple[type, ...] = ()) -> type:
    """The class with adapters, and with further bases, of a model class: of its name and module, transformers' keys."""
    if (cls, added) not in _CLASSES:
        forward: Any = cls.forward  # type: ignore[attr-defined]
        namespace = _names(cls) | {"forward": in_forward_context(forward), "_plain_class": cls, "_added": added}
        if issubclass(cls, GenerationMixin):
            namespace |= generation_methods(cls)
        _CLASSES[cls, added] = type(cls.__name__, (Swapped, *added, cls), namespace)
    return _CLASSES[cls, added]


class Swapped(ModelAdaptersMixin):
    """A model whose class was swapped: it is copied and pickled by way of its plain class."""

    _plain_class: type
    _added: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Rebuild from the plain class and the state."""
        return _rebuild, (self._plain_class, self._added), self.__dict__


def _rebuild(plain_class: type, added: tuple[type, ...] = ()) -> Any:
    cls: Any = adapted_class(plain_class, added)
    return cls.__new__(cls)


def _names(cls: type) -> dict[str, Any]:
    return {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}


def in_forward_context(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the context of a pass around it, and five more keyword arguments.

    output_adapter_gating_scores, output_adapter_fusion_attentions: report gates and fusion weights in the output;
    adapter_input_parallelized: the batch has a copy for every channel of Parallel; task_ids: rows for MultiTask;
    adapter_names: the setup of this pass, or a list with one for each row (None: no adapter).
    """
    signature = inspect.signature(forward)
    positional = [parameter.name for parameter in signature.parameters.values()][1:]

    @functools.wraps(forward)
    def forward_in_context(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = {name: kwargs.pop(name) for name in CONTEXT_ARGUMENTS if name in kwargs}
        outer, setups = state.forward, state.setups
        try:
            inside = outer is not None and outer.sites is self.adapter_sites
            if outer is not None and inside:
                current = outer
            else:
                if own.get("adapter_names") is not None:
                    state.setups = (*setups, AdapterSetup.of_names(own["adapter_names"], self.adapter_sites))
                current = _open(self, own, {**dict(zip(positional, args, strict=False)), **kwargs})
            if self.repeats_inputs and not current.repeated:
                args, kwargs, current = _repeat_for_parallel(current, args, kwargs)
            base, checked = self is self.adapter_sites.base_model, state.generating is self.adapter_sites
            if base and not checked and (current.setup or current.assignment is not None):
                check_batch(current, batch_size(args, kwargs))
            state.forward = current
            output = _entered(self, forward, inside)(self, *args, **kwargs)
        finally:
            state.forward, state.setups = outer, setups
        return output if current.record is None or outer is not None else with_record(output, current.record)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in CONTEXT_ARGUMENTS
        if name not in signature.parameters
    ]
    own: list[inspect.Parameter] = []
    rest: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        (rest if parameter.kind is parameter.VAR_KEYWORD else own).append(parameter)
    forward_in_context.__signature__ = signature.replace(parameters=[*own, *extra, *rest])  # type: ignore[attr-defined]
    return forward_in_context


def _entered(model: ModelAdaptersMixin, forward: Callable[..., Any], inside: bool) -> Callable[..., Any]:
    """The base model's forward with what sites at its entrance make of it; `inside`: another model's runs it."""
    sites = model.adapter_sites
    if sites.entrances and model is sites.base_model:
        for site in sites.entrances.values():
            forward = functools.partial(site.around, forward, inside=inside)
    return forward


def _open(model: ModelAdaptersMixin, own: Mapping[str, Any], inputs: Mapping[str, Any]) -> Forward:
    sites = model.adapter_sites
    setup, plans = sites.effective()
    context = AdapterSetup.acting_on(sites)
    named = context is not None and context.assignment is not None
    assignment = torch.tensor(context.assignment, device=model.device, dtype=torch.long) if context and named else None
    gates, attentions = own.get("output_adapter_gating_scores"), own.get("output_adapter_fusion_attentions")
    masks, generates = _masks(model, inputs), state.generating is sites
    if generates and state.prompt is None:
        state.prompt = _length(inputs, _token_inputs(model))
    tasks = own.get("task_ids")
    return Forward(
        sites,
        setup,
        plans,
        masks,
        task_ids=_task_ids(state.task_ids if tasks is None and generates else tasks, setup),
        assignment=assignment,
        repeated=bool(own.get("adapter_input_parallelized")) or generates,
        record=Record.of(bool(gates), bool(attentions)),
        past=_past(inputs.get("past_key_values")),
        prompt=state.prompt if generates else None,
        positions=inputs.get("position_ids") if generates and "" not in masks else None,
    )


def _past(cache: Any) -> int | Tensor:
    """The number of tokens in a cache. A static one counts in a tensor, which every layer's update changes."""
    length: int | Tensor = cache.get_seq_length() if isinstance(cache, (Cache, EncoderDecoderCache)) else 0
    return length.clone() if isinstance(length, Tensor) else length


def _token_inputs(model: ModelAdaptersMixin) -> tuple[str, str]:
    decodes = getattr(model.config, "is_encoder_decoder", False)
    return ("decoder_input_ids", "decoder_inputs_embeds") if decodes else ("input_ids", "inputs_embeds")


def _length(inputs: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The length of the sequence that the model is given."""
    found = (inputs.get(name) for name in names)
    return next((int(value.shape[1]) for value in found if isinstance(value, Tensor) and value.dim() > 1), None)


def _masks(model: ModelAdaptersMixin, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    names = (
        {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
        if encoder_decoder
        else {"": "attention_mask", "encoder": "encoder_attention_mask"}
    )
    masks = {stack: inputs.get(name) for stack, name in names.items()}
    return {stack: mask for stack, mask in masks.items() if isinstance(mask, Tensor) and mask.dim() == 2}


def _task_ids(given: Any, setup: Block | None) -> Tensor | None:
    blocks = [block for block in setup.blocks() if type(block) is MultiTask] if setup is not None else []
    if not blocks:
        return given if isinstance(given, Tensor) else None
    if given is None:
        raise CompositionError(
            f"{setup}: the forward call has no task_ids; pass task_ids=, one child of {blocks[0]} for each row."
        )
    task_ids = given if isinstance(given, Tensor) else torch.tensor(_numbers(given, blocks[0]))
    if task_ids.dim() != 1 or task_ids.dtype.is_floating_point:
        raise CompositionError(
            f"task_ids of the shape {tuple(task_ids.shape)} and of {task_ids.dtype}: they must be whole numbers, one "
            "for each row; task_ids.long() makes some of floats."
        )
    if not torch.compiler.is_compiling() and len(task_ids):  # to look at values would break the graph
        children = min(map(len, blocks))
        if int(task_ids.min()) < 0 or int(task_ids.max()) >= children:
            raise CompositionError(
                f"task_ids={task_ids.tolist()}: {setup} has {children} children; give each row one number from 0 to "
                f"{children - 1}, or a child's name."
            )
    return task_ids


def _numbers(tasks: Sequence[Any], block: MultiTask) -> list[int]:
    """The children that tasks are, which may be given by name."""
    names = [child if isinstance(child, str) else None for child in block.children]
    unknown = [task for task in tasks if not isinstance(task, int) and task not in names]
    if unknown:
        raise CompositionError(f"task_ids={list(tasks)}: {unknown[0]!r} is no child of {block}; use one of {names}.")
    return [task if isinstance(task, int) else names.index(task) for task in tasks]


def _repeat_for_parallel(
    current: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Forward]:
    """Everything with a row for each input once per channel of Parallel, channel after channel."""
    channels = 1 if current.setup is None else current.setup.parallel_channels
    if channels == 1:
        return args, kwargs, current
    args, kwargs, batch = repeat_inputs(args, kwargs, channels)
    masks = {stack: repeated(mask, batch, channels) for stack, mask in current.masks.items()}
    task_ids = repeated(current.task_ids, batch, channels, "task_ids")
    facts = {"masks": masks, "task_ids": task_ids, "channels": channels, "batch": batch}
    config = current.sites.base_model.config
    reported = any(
        kwargs.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")
    )
    # what the blocks report of themselves is to be of one batch size
    below = START if reported else current.sites.shared_below(current.plans)
    return args, kwargs, replace(current, repeated=True, shared_below=below, **facts)


ENCODER_STEPS = ("_maybe_prepare_encoder_kwargs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation")
"""How generation calls the encoder: the name since transformers 5.22, and the one before."""


def generation_methods(cls: Any) -> dict[str, Callable[..., Any]]:
    """The methods of a class that generates, with contexts around them: ``generate``, and its step for the encoder."""
    steps = {name: _encoder_step(getattr(cls, name)) for name in ENCODER_STEPS if hasattr(cls, name)}
    return {"generate": _generate(cls), **steps}


def _generate(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.generate)
    def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None)
        chosen = nullcontext() if names is None else AdapterSetup.of_names(names, self.adapter_sites)
        decodes = getattr(self.config, "is_encoder_decoder", False)  # whose prompt is complete at the first pass only
        prompt = None if decodes else _length({"inputs": inputs, **kwargs}, ("inputs", *_token_inputs(self)))
        with chosen, generating(self.adapter_sites, prompt):
            setup = self.effective_setup()
            if setup is not None:
                inputs, kwargs = _for_setup(self, setup, inputs, kwargs)
            given = (inputs,) if inputs is not None or args else ()
            return cls.generate(self, *given, *args, **kwargs)

    return generate


def _for_setup(model: Any, setup: Block, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inputs of ``generate`` for a setup: sizes are checked, and all is repeated for Parallel."""
    check_growing(setup, counted="past_key_values" in inspect.signature(model.forward).parameters)
    if setup.parallel_channels > 1:
        (inputs,), kwargs, _ = repeat_inputs((inputs,), kwargs, setup.parallel_channels)
    state.task_ids = kwargs.get("task_ids")
    check_batch(_open(model, {}, {}), batch_size((inputs,), kwargs))
    return inputs, kwargs


def _encoder_step(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def prepare(self: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = {name: model_kwargs.pop(name) for name in CONTEXT_ARGUMENTS if name in model_kwargs}
        given = {name: value for name, value in model_kwargs.items() if not name.startswith("decoder_")}
        with within(_open(self, own, given)):
            prepared = step(self, inputs_tensor, model_kwargs, *args, **kwargs)
        return {**prepared, **own}

    return prepare
