"""Taking adapters over from a model that PEFT has wrapped."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ...composition import Stack
from ...errors import AdapterError
from .. import heads
from ..placing import Adapters, all_or_nothing, place
from .draft import Options
from .loading import head_of
from .reading import read

if TYPE_CHECKING:
    from ...model import ModelAdaptersMixin

ASKED = "adapters.init(PeftModel)"


def is_wrapped(model: Any) -> bool:
    """Whether PEFT has wrapped a model; PEFT itself need not be installed."""
    return any(kind.__module__.startswith("peft.") for kind in type(model).__mro__)


def take_over(wrapper: Any) -> Any:
    """The transformers model in a PeftModel, plain again, with PEFT's adapters as ours and the same ones active.

    The wrapper is empty afterwards. A failure leaves it as it was.

    Raises:
        AdapterError: An adapter cannot be mapped, or is merged into the weights.
    """
    _check(wrapper)
    from peft import get_peft_model_state_dict

    options = {name: _options(config) for name, config in wrapper.peft_config.items()}
    states = {
        name: get_peft_model_state_dict(wrapper, adapter_name=name, save_embedding_layers=False) for name in options
    }
    active = [name for name in wrapper.active_adapters if name in options]
    acts = not any(vars(module).get("_disable_adapters") for module in wrapper.modules())
    trains = any(parameter.requires_grad for parameter in wrapper.parameters())
    with _restored_on_failure(wrapper):
        prompts = wrapper.peft_config[active[0]].is_prompt_learning
        model = _unwrapped(wrapper.base_model if prompts else wrapper.unload())
        from ...wrap import init  # which calls this function

        init(model)
        with all_or_nothing(model) as undo:
            for name in options:
                _put(model, name, options[name], states[name], name in active[:1], undo)
        if trains:
            _train(model, active)
        model.set_active_adapters((active[0] if len(active) == 1 else Stack(*active)) if acts else None)
    return model


def _check(wrapper: Any) -> None:
    if type(wrapper).__name__ == "PeftMixedModel":
        raise AdapterError(
            f"{ASKED}: it is a PeftMixedModel; load the adapters one by one (load_adapter) and put them into a Stack."
        )
    if not all(hasattr(wrapper, name) for name in ("peft_config", "active_adapters", "get_base_model")):
        raise AdapterError(
            f"adapters.init({type(wrapper).__name__}): give the PeftModel, as get_peft_model returns it."
        )
    if any(vars(module).get("merged_adapters") for module in wrapper.modules()):
        raise AdapterError(f"{ASKED}: an adapter is merged into the weights; call unmerge_adapter() first.")


def _unwrapped(model: nn.Module) -> Any:
    """Without the copies of whole modules, which not every method of PEFT takes off."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_wrapped(child):
                module._modules[name] = cast(nn.Module, child.original_module)
    return model


def _options(config: Any) -> Options:
    """A configuration as in PEFT's files."""
    plain = {name: getattr(value, "value", value) for name, value in config.to_dict().items()}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}


def _put(
    model: "ModelAdaptersMixin", name: str, options: Options, state: Mapping[str, Any], with_head: bool, undo: ExitStack
) -> None:
    tensors = {key: tensor.cpu() for key, tensor in state.items()}
    saved, head = read(model, options, tensors, name, ASKED, alone=False)
    if head and not with_head:
        warnings.warn(f"{ASKED}: the head of {name!r} is left out: the model has one, the active one's.", stacklevel=5)
    place(Adapters(model), saved, ASKED, None, undo)
    found = head_of(model, head, options, name, ASKED) if with_head else None
    if found is not None:
        heads.place_head(model, found, ASKED, False, None, undo)


def _train(model: "ModelAdaptersMixin", active: list[str]) -> None:
    """Train what PEFT trained: the active adapters and their head."""
    mode = model.training
    model.train_adapter(Stack(*active))
    model.train(mode)
    base = set(map(id, model.base_model.parameters()))
    for parameter in model.parameters():
        if id(parameter) not in base:
            parameter.requires_grad_(True)
    model.freeze_embeddings()


@contextmanager
def _restored_on_failure(wrapper: nn.Module) -> Iterator[None]:
    """Put every module back where it was if the block fails."""
    modules = list(wrapper.modules())
    before = [(module, type(module), {**vars(module)}, {**module._modules}) for module in modules]
    try:
        yield
    except BaseException:
        for module, kind, fields, children in before:
            module.__class__ = cast(Any, kind)
            vars(module).clear()
            vars(module).update(fields, _modules=children)
        raise
