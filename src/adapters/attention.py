"""The one seam into transformers' attention functions: prefixes enter between a layer's projections and its attention.

An attention module asks its config which implementation to call. While prefixes sit there it is given a view of the
config that names ours; ours puts the prefix in front of keys and values and calls the one the user chose. The
model's config, which decides how masks are built, stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .composition import Setup
from .context import Kept
from .errors import AdapterError
from .evaluation import evaluate
from .interfaces import PREFIX_LOCATIONS
from .signals import PrefixSignal
from .sites import Place, Site
from .topology import Anatomy

IMPLEMENTATION = "adapters"


class ConfigView:
    """A config as one attention module sees it: all as in the model's, but the attention implementation."""

    def __init__(self, config: Any, site: AttentionSite) -> None:
        """See the class."""
        self.__dict__.update(config=config, site=site)

    _attn_implementation = IMPLEMENTATION

    def __getattr__(self, name: str) -> Any:
        """The model's config has the rest."""
        if name.startswith("__") or "config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Into the model's config."""
        setattr(self.__dict__["config"], name, value)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Copies view the copy of the config."""
        return type(self), (self.__dict__["config"], self.__dict__["site"])


class AttentionSite(Site):
    """Between an attention's projections and its attention function."""

    kind = "attention"
    locations: ClassVar[dict[str, str]] = {"self_attention": "self_prefix", "cross_attention": "cross_prefix"}
    holder = "prefix_tuning"

    def __init__(
        self, place: Place, core: nn.Module, heads: int, head_width: int, width: int, own_name: str | None = None
    ) -> None:
        """heads: of keys and values; width: d of the hidden states given to the attention; own_name: see location."""
        super().__init__(place, core)
        self.heads, self.head_width, self.width, self.own_name = heads, head_width, width, own_name
        self.own_attention = _own_attention(type(core))
        self._kept = Kept()

    @property
    def location(self) -> str:
        """As 1.x names prefixes: encoders of encoder-decoder models and some architectures have their own names."""
        if self.own_name is not None:
            return self.own_name
        if self.stack == "encoder" and self.role == "self_attention":
            return "encoder_prefix"
        return super().location

    @classmethod
    def find(cls, anatomy: Anatomy) -> Iterator[Self]:
        """Every attention."""
        own_name = PREFIX_LOCATIONS.get(getattr(anatomy.base_model.config, "model_type", ""))
        for block in anatomy.blocks:
            for core in block.cores:
                place = Place(block.layer, block.stack, block.path, core.path, core.role)
                width = block.width
                yield cls(place, core.module, core.key_heads, core.head_width, width, own_name)

    def attach(self) -> list[RemovableHandle]:
        """Give the attention module its view of the config, and note the hidden states it is called with."""
        host: Any = self.host
        forward = inspect.unwrap(type(host).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
            raise AdapterError(
                f"add_adapter: the attention at {self.host_path} does not use transformers' attention functions, so "
                "prefixes have no way in; use LoRA or a bottleneck adapter for this model."
            )
        host.config = ConfigView(host.config, self)
        return [host.register_forward_pre_hook(self.on_input, prepend=True, with_kwargs=True)]

    def detach(self) -> None:
        """Give the config back."""
        host: Any = self.host
        if isinstance(vars(host).get("config"), ConfigView):
            host.config = host.config.__dict__["config"]

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the hidden states: gated prefixes look at them."""
        if self.plan() is not None:
            self._kept.residual = args[0] if args else kwargs["hidden_states"]

    def prefix(self, plan: Setup, query: Tensor, key: Tensor) -> PrefixSignal:
        """What `plan` puts in front of the keys (b, heads, k, head width)."""
        rows = key.shape[0]
        hidden = self._kept.residual
        if hidden is None:
            hidden = query.new_zeros(rows, query.shape[2], self.width)
        empty = key.new_zeros(rows, self.heads, 0, self.head_width)
        return evaluate(plan, PrefixSignal(None, hidden, empty, empty), self)


def adapted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attention over [prefix; keys] by the implementation that the model's config names.

    query: (b, heads, q, w); key, value: (b, key heads, k, w); attention_mask: None, additive or boolean (b, 1, q, k),
    or a BlockMask of flex attention. Every query sees the prefix; positions of real keys do not change.
    """
    view: Any = module.config
    site: AttentionSite = view.site
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(view.config._attn_implementation, site.own_attention)
    plan = site.plan()
    if plan is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    prefix = site.prefix(plan, query, key)
    length = prefix.key.shape[2]
    if not length:
        return attend(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (length, 0))
    if attention_mask is None or isinstance(attention_mask, Tensor):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        eager = view.config._attn_implementation == "eager"
        mask: Any = _tensor_mask(attention_mask, prefix.bias, length, query, key, bool(causal), eager)
    else:
        mask = _block_mask(attention_mask, prefix.bias, length, key)
    key = torch.cat([prefix.key.to(key.dtype), key], 2)
    value = torch.cat([prefix.value.to(value.dtype), value], 2)
    return attend(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, adapted_attention)


def _own_attention(kind: type[nn.Module]) -> Any:
    """The eager attention of the file that a class of attention modules is written in."""
    files = (sys.modules.get(base.__module__) for base in kind.__mro__)
    return next(filter(None, (getattr(file, "eager_attention_forward", None) for file in files)), None)


def _tensor_mask(
    mask: Tensor | None, bias: Tensor | None, length: int, query: Tensor, key: Tensor, causal: bool, eager: bool
) -> Tensor | None:
    """The mask (b or 1, 1, q, p + k): `mask` with the prefix's `length` columns in front."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if bias is None and (queries == 1 or not causal):
            return None
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries) if causal else mask
        if eager:
            mask = _additive(mask, query.dtype)
    mask = mask[..., :keys]
    if bias is None:
        return nn.functional.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    if mask.dtype == torch.bool:
        mask = _additive(mask, query.dtype)
    columns = bias[:, None].clamp(min=torch.finfo(mask.dtype).min).to(mask.dtype)
    rows, heads, queries = max(mask.shape[0], bias.shape[0]), mask.shape[1], max(mask.shape[2], bias.shape[1])
    return torch.cat([part.expand(rows, heads, queries, -1) for part in (columns, mask)], -1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _block_mask(mask: Any, bias: Tensor | None, length: int, key: Tensor) -> Any:
    """A BlockMask of flex attention with the prefix's columns in front."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = key.shape[0]
    seen = torch.ones(rows, length, dtype=torch.bool, device=key.device)
    if bias is not None:
        seen = (bias[:, 0] > float("-inf")).expand(rows, length)
        if bias.shape[1] != 1 or bool((bias[:, 0] * seen).nan_to_num(0.0).any()):
            raise AdapterError(
                "prefix tuning: flex attention takes no weights on prefixes, as Average and Split need them; use "
                'attn_implementation="sdpa" or "eager" for this setup.'
            )

    def allowed(row: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        own: Tensor = mask.mask_mod(row, head, query, (column - length).clamp(min=0))
        return torch.where(column < length, seen[row, column.clamp(max=length - 1)], own)

    return create_block_mask(allowed, rows, None, mask.seq_lengths[0], length + key.shape[2], device=str(key.device))
