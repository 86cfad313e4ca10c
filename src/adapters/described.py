"""Models that their users describe: their blocks, and transformers' names for their parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import AdapterError
from .interface import AdapterModelInterface
from .topology import Block, Core, Linear, equal_slice, head_width_of, linear_shape, linears_below, width_of


class Described:
    """A model of transformers with an ``AdapterModelInterface``."""

    adapter_interface: AdapterModelInterface
    base_model: Any

    def get_input_embeddings(self) -> nn.Module:
        """The described embeddings."""
        found: nn.Module = self.base_model.get_submodule(self.adapter_interface.model_embeddings)
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put others in their place."""
        self.base_model.set_submodule(self.adapter_interface.model_embeddings, value)


class DescribedModule(Described):
    """A module of torch with an ``AdapterModelInterface``: it has what a model of transformers has beside."""

    base_model_prefix = ""
    parameters: Any
    forward: Any

    @property
    def base_model(self) -> Any:
        """The part of the module that the interface names; without one the module itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def main_input_name(self) -> str:
        """The first argument of the forward pass."""
        return next(iter(inspect.signature(self.forward).parameters), "")

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        device: torch.device = next(self.parameters()).device
        return device

    def get_output_embeddings(self) -> None:
        """No map onto words is known."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Not of a module of torch.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            f"save_pretrained({str(save_directory)!r}): {type(self).__name__} is a module of torch, which transformers "
            "cannot build again; save its state_dict with torch.save, and adapters with save_adapter."
        )


def give_config(model: nn.Module, base: nn.Module, interface: AdapterModelInterface) -> None:
    """Give a module of torch, and its base model, a config in transformers' sense, where they have none.

    Raises:
        AdapterError: its attribute ``config`` is something else.
    """
    table = base.get_submodule(interface.model_embeddings)
    sizes: Any = {}
    if isinstance(table, nn.Embedding):
        sizes = {"hidden_size": table.embedding_dim, "vocab_size": table.num_embeddings}
    for part in cast("tuple[Any, Any]", (model, base)):
        known = getattr(part, "config", None)
        if known is None:
            part.config = PreTrainedConfig(**sizes) if part is model else model.config
        elif not isinstance(known, PreTrainedConfig):
            raise AdapterError(
                f"adapters.init({type(model).__name__}): the attribute config of its {type(part).__name__} is a "
                f"{type(known).__name__}; it must be a PreTrainedConfig or not be there. Rename it."
            )


def bases_of(model: nn.Module) -> tuple[type, ...]:
    """The class that a model with an interface gets beside the mixin."""
    return (Described if isinstance(model, PreTrainedModel) else DescribedModule,)


@contextmanager
def unchanged_on_failure(*models: nn.Module) -> Iterator[None]:
    """Put back the classes and attributes of these models if the block fails."""
    before = [(model, type(model), dict(vars(model))) for model in models]
    try:
        yield
    except BaseException:
        for model, kind, attributes in before:
            model.__class__, model.__dict__ = kind, attributes
        raise


def described_blocks(base_model: nn.Module, interface: AdapterModelInterface) -> list[Block]:
    """The blocks as the user describes them.

    Raises:
        AdapterError: what is said to be a projection is no linear map.
    """

    def linear(path: str) -> Linear:
        module = base_model.get_submodule(path)
        shape = linear_shape(module)
        if shape is None:
            raise AdapterError(f"AdapterInterface: {path!r} is a {type(module).__name__}, no linear map; name one.")
        return Linear(path, module, *shape)

    def core(path: str, role: str) -> Core:
        names = {part: getattr(interface, f"attn_{part}_proj") or interface.attn_qkv_proj for part in "qkvo"}
        found = {part: linear(_joined(path, name)) for part, name in names.items()}
        if interface.attn_qkv_proj:
            found |= {part: equal_slice(found[part], part, place, 3) for place, part in enumerate("qkv")}
        module = base_model.get_submodule(path)
        return Core(path, module, role, found, head_width_of(module, base_model.config, found))

    blocks = []
    for layer, (name, module) in enumerate(base_model.get_submodule(interface.model_layers).named_children()):
        path = f"{interface.model_layers}.{name}"
        attentions = {"self_attention": interface.layer_self_attn, "cross_attention": interface.layer_cross_attn}
        cores = tuple(core(_joined(path, below), role) for role, below in attentions.items() if below is not None)
        maps = {"intermediate": interface.layer_intermediate_proj, "output": interface.layer_output_proj}
        feed_forward = {role: linear(_joined(path, below)) for role, below in maps.items()}
        blocks.append(
            Block(path, module, layer, "", width_of(module, linears_below(module, path)), cores, feed_forward)
        )
    return blocks


def _joined(path: str, below: str | None) -> str:
    """A path below another; "" is the module itself."""
    return f"{path}.{below}" if below else path
