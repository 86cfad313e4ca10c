"""Prefixes enter between a layer's projections and its attention.

An attention module asks its config which of transformers' functions to call. While prefixes sit there it is given a
view of the config that names ours; ours puts the prefix in front of keys and values and calls the one the user chose.
The model's config, which decides how masks are built, stays as it is. What a module computes itself is followed, see
``following.py``.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .composition import Setup
from .context import Kept
from .errors import AdapterError
from .evaluation import evaluate
from .following import PACKED, UNSEEN, Follower
from .interfaces import PREFIX_LOCATIONS
from .signals import PrefixSignal
from .sites import Place, Site
from .survey import Shape, survey
from .topology import CROSSES, Anatomy, Block, Core
from .trace import tensors_in
from .trails import laid

IMPLEMENTATION = "adapters"
FORWARD = "forward"


class Implementation(str):
    """Our name, which passes for that of the implementation that was chosen where a module prepares masks for SDPA."""

    chosen: str

    def __new__(cls, chosen: str) -> Self:
        """See the class."""
        name = super().__new__(cls, IMPLEMENTATION)
        name.chosen = chosen
        return name

    def __eq__(self, other: object) -> bool:
        return other in (str(self), self.chosen)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class ConfigView:
    """A config as one attention module sees it: all as in the model's, but the attention implementation."""

    def __init__(self, config: Any, site: AttentionSite) -> None:
        """See the class."""
        self.__dict__.update(config=config, site=site)

    @property
    def _attn_implementation(self) -> str:
        if self.__dict__["site"].compares:
            return Implementation(self.__dict__["config"]._attn_implementation)
        return IMPLEMENTATION

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

    def __init__(self, place: Place, core: nn.Module, shape: Shape, width: int, own_name: str | None = None) -> None:
        """width: d of the hidden states given to the attention; own_name: see location."""
        super().__init__(place, core)
        self.shape, self.width, self.own_name = shape, width, own_name
        self.own_attention, self.compares = _own_attention(type(core)), _compares(type(core))
        self._followed = Followed(self)
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
        shapes, run = ({}, set()) if _tells(anatomy.blocks) else survey(anatomy.base_model, anatomy.blocks)
        found = [(block, *attention) for block in anatomy.blocks for attention in _attentions(block, shapes, run)]
        able = [entry for entry in found if entry[-1].refused not in (UNSEEN, PACKED)]
        for block, path, host, role, shape in able or found:  # linear attention beside others, the images of a text
            place = Place(block.layer, block.stack, block.path, path, role)
            yield cls(place, host, shape, block.width, own_name)

    def require_way_in(self) -> None:
        """Refuse a prefix that could not enter.

        Raises:
            AdapterError: its keys and values cannot be put in front of those of the attention.
        """
        if self.shape.refused:
            raise AdapterError(
                f"add_adapter: the attention at {self.host_path} {self.shape.refused}; use LoRA or a bottleneck "
                "adapter for this model."
            )

    def attach(self) -> list[RemovableHandle]:
        """Give the attention module its view of the config, or follow it, and note the hidden states it is given."""
        host: Any = self.host
        if _asks(host):
            host.config = ConfigView(host.config, self)
        else:
            self._followed.attach()
        return [host.register_forward_pre_hook(self.on_input, prepend=True, with_kwargs=True)]

    def detach(self) -> None:
        """Give the config back, or the forward."""
        host: Any = self.host
        if isinstance(vars(host).get("config"), ConfigView):
            host.config = host.config.__dict__["config"]
        self._followed.detach()

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the hidden states: gated prefixes look at them."""
        if self.plan() is not None:
            self._kept.residual = next(tensors_in((*args, kwargs.get("hidden_states"), *kwargs.values())))

    def prefix(self, plan: Setup, key: Tensor, total: int) -> PrefixSignal:
        """What `plan` puts in front of the keys, which are of so many rows and heads."""
        hidden, heads = self._kept.residual, self.shape.heads
        if hidden is None:
            hidden = key.new_zeros(max(total // heads, 1), 1, self.width)
        if self.shape.batch_second or (hidden.dim() == 3 and total % (hidden.shape[0] * heads)):
            hidden = hidden.transpose(0, 1)
        hidden = hidden[None] if hidden.dim() == 2 else hidden.flatten(1, -2)
        own = (key.new_zeros(len(hidden), heads, 0, w) for w in (self.shape.key_width, self.shape.value_width))
        return evaluate(plan, PrefixSignal(None, hidden, *own), self)


class Followed:
    """Stands in for the forward of an attention that computes its scores itself."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.before: Any = None

    def attach(self) -> None:
        """Take the forward's place."""
        host = vars(self.site.host)
        self.before = host.get(FORWARD)
        host[FORWARD] = self.forward

    def detach(self) -> None:
        """Give it back."""
        host = vars(self.site.host)
        if host.get(FORWARD) == self.forward:
            del host[FORWARD]
            host |= {} if self.before is None else {FORWARD: self.before}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention gives, with the prefix in front of its keys and values."""
        host, plan = self.site.host, self.site.plan()
        before = self.before or functools.partial(type(host).forward, host)
        return before(*args, **kwargs) if plan is None else self.follow(plan, before, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def follow(self, plan: Setup, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass with prefixes, which the compiler cannot see through."""
        with Follower(Prefixes(self.site, plan)) as follower:
            output = forward(*args, **kwargs)
        follower.finish()
        return output


class Prefixes:
    """The prefixes of one call of an attention."""

    def __init__(self, site: AttentionSite, plan: Setup) -> None:
        self.site, self.plan = site, plan
        self.found: PrefixSignal | None = None

    def keys(self, operand: Tensor) -> PrefixSignal:
        """For keys (…, w, k)."""
        if operand.shape[-2] != self.site.shape.key_width:
            self.refuse(f"has keys of width {operand.shape[-2]}, not {self.site.shape.key_width}")
        if self.found is None:
            self.found = self.site.prefix(self.plan, operand, math.prod(operand.shape[:-2]))
        return self.found

    def values(self, prefix: PrefixSignal, operand: Tensor) -> Tensor:
        """(b, heads, p, w)."""
        return prefix.value

    def refuse(self, reason: str) -> NoReturn:
        """The attention is one that cannot be followed."""
        raise AdapterError(
            f"prefix tuning: the attention at {self.site.host_path} {reason}; use LoRA or a bottleneck adapter for "
            "this model, or another attn_implementation."
        )


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
    prefix = site.prefix(plan, key, key.shape[0] * key.shape[1])
    length = prefix.key.shape[2]
    if not length:
        return attend(module, query, key, value, attention_mask, **kwargs)
    bias = None if prefix.bias is None else laid(prefix.bias[:, None], (key.shape[0], 1))[:, 0]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (length, 0))
    if attention_mask is None or isinstance(attention_mask, Tensor):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        eager = view.config._attn_implementation == "eager"
        mask: Any = _tensor_mask(attention_mask, bias, length, query, key, bool(causal), eager)
    else:
        mask = _block_mask(attention_mask, bias, length, key)
    key = torch.cat([laid(prefix.key.to(key.dtype), key.shape[:2]), key], 2)
    value = torch.cat([laid(prefix.value.to(value.dtype), value.shape[:2]), value], 2)
    return attend(module, query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, adapted_attention)


def _asks(host: nn.Module) -> bool:
    """Whether a module asks its config which of transformers' attention functions to call."""
    forward = inspect.unwrap(type(host).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names and "config" in vars(host)


def _tells(blocks: list[Block]) -> bool:
    """Whether names and shapes of projections tell all about the attentions of a model."""
    cores = [(block, core) for block in blocks for core in block.cores]
    return bool(cores) and all(_asks(core.module) and _is_plain(block, core) for block, core in cores)


def _is_plain(block: Block, core: Core) -> bool:
    """Whether keys and values are projected alike from hidden states, by maps of their own or GPT-2's equal parts."""
    keys, values = core.projections["k"], core.projections["v"]
    apart = not keys.part or keys.path.endswith("c_attn")
    return core.role == "cross_attention" or (apart and keys.inputs == block.width and keys.outputs == values.outputs)


def _is_over_channels(block: Block, core: Core, shape: Shape) -> bool:
    """Whether what an attention sees is not split as its keys are: as long as a sequence, not as wide as a head."""
    keys, values = core.projections["k"], core.projections["v"]
    alike = keys.inputs == block.width and keys.outputs == values.outputs
    return alike and not shape.refused and shape.heads * shape.key_width != keys.outputs


def _attentions(
    block: Block, shapes: dict[nn.Module, Shape], run: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, str, Shape]]:
    """The attentions of a block, with path and role; one over channels is none."""
    for core in block.cores:
        read = Shape(core.key_heads, core.head_width, core.head_width)
        unseen = core.module in run and not _asks(core.module)
        shape = shapes.get(core.module, replace(read, refused=UNSEEN) if unseen else read)
        if _asks(core.module) and shape.refused not in ("", PACKED):
            shape = read
        if not _is_over_channels(block, core, shape):
            yield core.path, core.module, core.role, shape
    if block.cores:
        return
    found = [(name, module) for name, module in block.module.named_modules() if module in shapes]
    for number, (name, module) in enumerate(found):
        across = number > 0 or CROSSES.search(name) is not None
        path = ".".join(filter(None, (block.path, name)))
        yield path, module, "cross_attention" if across else "self_attention", shapes[module]


def _compares(kind: type[nn.Module]) -> bool:
    """Whether what attention modules of a class do depends on whether SDPA was chosen."""
    constants = inspect.unwrap(kind.forward).__code__.co_consts
    return any(value == "sdpa" or (isinstance(value, tuple) and "sdpa" in value) for value in constants)


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
