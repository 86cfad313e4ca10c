"""Prefixes in an attention that a module computes itself, by products and a softmax.

The module's forward runs under a mode that follows the data. A product of queries and keys whose result comes to a
softmax gives scores; those of the prefix come from the same product with its keys (see ``trails.py``). The softmax is
over both, and what its weights give of the values has the prefix's share added. The module itself sees tensors without
a prefix throughout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear, pad, softmax
from torch.overrides import TorchFunctionMode

from .signals import PrefixSignal
from .trace import tensors_in
from .trails import (
    PEAKS,
    PRODUCTS,
    SCALES,
    Again,
    Pattern,
    Product,
    Trail,
    Weights,
    laid,
    on_keys,
    on_scores,
    operands,
    rank,
)

UNSEEN = "has no product of queries and keys with a softmax after it"
PACKED = "has the positions of all rows in one dimension, so no row can have a prefix of its own"
UNUSED = "does not multiply the weights of its softmax with values, or not as they are"


class Source(Protocol):
    """Where prefixes come from."""

    def keys(self, operand: Tensor) -> PrefixSignal:
        """For keys (…, w, k) that queries are multiplied with."""

    def values(self, prefix: PrefixSignal, operand: Tensor) -> Tensor:
        """(b, heads, p, w) for values (…, k, w) that the weights are multiplied with."""

    def refuse(self, reason: str) -> NoReturn:
        """The attention is one that cannot be followed."""


class Follower(TorchFunctionMode):
    """Follows the data of a pass, operation by operation."""

    def __init__(self, source: Source) -> None:
        """See the class."""
        super().__init__()
        self.source = source
        self._trails: dict[int, Trail] = {}
        self._open: set[Weights] = set()
        self._products = 0
        self.attended = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``step``."""
        return self.step(func, getattr(func, "__name__", ""), args, kwargs or {})

    def step(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func`, of this name, gives, with the prefix's share where it belongs."""
        name = name.strip("_")
        if name in PRODUCTS:
            return self._multiply(func, name, args, kwargs)
        if name == "softmax":
            return self._soften(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._attend(func, *args, **kwargs)
        if name == "multi_head_attention_forward":
            call = inspect.signature(func).bind(*args, **kwargs)
            call.apply_defaults()
            return self._write_out(call.arguments)
        result = func(*args, **kwargs)
        given = [trail for value in tensors_in((*args, *kwargs.values())) if (trail := self._trail(value)) is not None]
        if isinstance(result, Tensor) and (given or name in SCALES):
            self._note(result, self._next(name, Again(func, args, kwargs, result), given))
        elif given and given[0].origin is not None:
            for part in tensors_in([result]):
                self._note(part, Trail(part, given[0].origin, lost=name))
        return result

    def finish(self) -> None:
        """The module has returned: there were scores, and all weights have met their values."""
        if self._open:
            self.source.refuse(UNUSED)
        if not self.attended:
            self.source.refuse(UNSEEN)

    def _trail(self, tensor: Tensor) -> Trail | None:
        found = self._trails.get(id(tensor))
        return found if found is not None and found.tensor is tensor else None

    def _note(self, tensor: Tensor, trail: Trail | None) -> None:
        self._trails.pop(id(tensor), None)
        if trail is not None:
            self._trails[id(tensor)] = trail

    def _next(self, name: str, call: Again, given: list[Trail]) -> Trail | None:
        """The trail of a result; None if it has none."""
        result = call.result
        main = min(given, key=rank, default=Trail(call.args[0] if call.args else result, None))
        if main.lost:
            return replace(main, tensor=result)
        if main.origin is None:
            steps = on_keys(name, main, call)
            return Trail(result, None, main.steps + steps) if steps or (steps is not None and main.steps) else None
        if len({trail.origin for trail in given if isinstance(trail.origin, Product) and not trail.lost}) > 1:
            return Trail(result, main.origin, lost="another product's")
        steps = on_scores(name, main, call, [trail.tensor for trail in given if trail.level])
        if steps is None:
            return Trail(result, main.origin, lost=name)
        return Trail(result, main.origin, main.steps + steps, level=main.level or name in PEAKS)

    def _multiply(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product: of weights and values, or perhaps of queries and keys."""
        result = func(*args, **kwargs)
        pattern, pair, factor = operands(name, args, kwargs)
        if pair is None:
            return result
        first, second = pair
        trail = self._trail(first)
        if trail is not None and isinstance(trail.origin, Weights):
            if trail.lost or pattern is None or not pattern.takes_weights:
                return result
            return result + self._share(trail, trail.origin, pattern, second)
        if pattern is not None and pattern.gives_scores and min(first.dim(), second.dim()) > 1:
            self._products += 1
            before = self._trail(second)
            scales = before.steps if before is not None and before.origin is None else ()
            product = Product(self._products, first, second, pattern, factor, scales, torch.is_grad_enabled())
            self._note(result, Trail(result, product))
        return result

    def _share(self, trail: Trail, origin: Weights, pattern: Pattern, second: Tensor) -> Tensor:
        """What the prefix's weights give of its values."""
        operand = pattern.canonical(second)
        values = laid(self.source.values(origin.prefix, operand), operand.shape[:-2])
        self._open.discard(origin)
        self.attended = True
        return pattern.multiply(trail.replay(origin.own).to(trail.tensor.dtype), values.to(second.dtype))

    def _soften(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A softmax, of scores or of something else."""
        given = args[0] if args else kwargs["input"]
        trail = self._trail(given)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if trail is None or not isinstance(trail.origin, Product) or dim not in (-1, given.dim() - 1):
            return func(*args, **kwargs)
        product = trail.origin
        operand = product.pattern.canonical(product.keys)
        if trail.lost or trail.level or operand.shape[-1] != given.shape[-1]:
            self.source.refuse(f"changes its scores by {trail.lost or 'a view'}, which is not known")
        if product.differentiated and not torch.is_grad_enabled():
            self.source.refuse("has a softmax with a gradient of its own, in which a prefix has no part")
        prefix = self.source.keys(operand)
        own = trail.replay(product.scores(prefix)).to(given.dtype)
        if prefix.bias is not None:
            own = own + laid(prefix.bias[:, None].to(own.dtype), own.shape[:-2])
        whole = Again(func, args, kwargs, given).with_(given, torch.cat([own, given], -1))
        length = own.shape[-1]
        weights = whole[..., length:].contiguous()  # the module may want to view them
        origin = Weights(prefix, whole[..., :length])
        self._open.add(origin)
        self._note(weights, Trail(weights, origin))
        return weights

    def _attend(
        self,
        func: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Attention in one operation."""
        prefix = self.source.keys(key.transpose(-1, -2))
        keys, values = prefix.key, self.source.values(prefix, value)
        if attn_mask is None and is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
        mask = _masked(attn_mask, prefix, query, key.shape[-2])
        trail = self._trail(key)
        keys = laid(keys if trail is None else trail.replay(keys), key.shape[:-2]).to(key.dtype)
        values = laid(values, value.shape[:-2]).to(value.dtype)
        self.attended = True
        return func(query, torch.cat([keys, key], -2), torch.cat([values, value], -2), mask, dropout_p, **kwargs)

    def _write_out(self, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """torch's whole attention from (s, b, d), step by step; its output and the mean weights of the heads."""
        weights: Any = [call[f"{part}_proj_weight"] for part in "qkv"]
        if not call["use_separate_proj_weight"]:
            weights = call["in_proj_weight"].chunk(3)
        biases = (None,) * 3 if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)
        heads, parts = call["num_heads"], []
        for states, weight, bias in zip((call["query"], call["key"], call["value"]), weights, biases, strict=True):
            parts.append(linear(states, weight, bias).view(*states.shape[:2], heads, -1).permute(1, 2, 0, 3))
        query, key, value = parts
        with self:
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            hidden = call["key_padding_mask"]
            for mask in (call["attn_mask"], None if hidden is None else hidden[:, None, None]):
                if mask is not None:
                    mask = mask.view(-1, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
                    boolean = mask.dtype == torch.bool
                    scores = scores.masked_fill(mask, float("-inf")) if boolean else scores + mask
            probabilities = dropout(softmax(scores, -1), call["dropout_p"], call["training"])
            output = (probabilities @ value).permute(2, 0, 1, 3).flatten(2)
        return linear(output, call["out_proj_weight"], call["out_proj_bias"]), probabilities.mean(1)


def _masked(mask: Tensor | None, prefix: PrefixSignal, query: Tensor, keys: int) -> Tensor | None:
    """The mask (…, q, p + k) of attention in one operation."""
    if prefix.bias is None:
        value = mask is not None and mask.dtype == torch.bool
        return None if mask is None else pad(mask, (prefix.key.shape[2], 0), value=value)
    if mask is None:
        mask = query.new_zeros(1, 1)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    columns = laid(prefix.bias[:, None].to(mask.dtype), query.shape[:-2])
    lead = query.shape[:-1]
    return torch.cat([columns.expand(*lead, columns.shape[-1]), mask.expand(*lead, keys)], -1)
