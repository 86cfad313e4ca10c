"""Trainable tokens: the embeddings of some tokens are trained, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_dtype, is_integer
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..method import AdapterModule, register
from ..vocabulary import LookupSignal, LookupSite, OutputSignal, OutputSite


@dataclass(eq=False)
class TrainableTokensConfig(AdapterConfig):
    """The tokens whose embeddings are trained, by their ids: new ones, or special ones. PEFT's method of that name.

    Where the map onto the vocabulary shares the weight of the embeddings, it follows.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "trainable_tokens"
    token_indices: list[int] = field(default_factory=list)
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = list(self.token_indices) if isinstance(self.token_indices, Sequence) else [None]
        if not all(is_integer(index) and index >= 0 for index in ids) or len(set(ids)) != len(ids):
            raise self.refusal("token_indices", "no list of tokens", "it must be a list of different ids >= 0")
        self.normalize("token_indices", ids)
        check_dtype(self, "dtype")


register_architecture("trainable_tokens", TrainableTokensConfig)
register_config("trainable_tokens", TrainableTokensConfig())


class Changes(nn.Module):
    """D (n, d): what is added to the embeddings of the tokens."""

    def __init__(self, config: TrainableTokensConfig, site: LookupSite) -> None:
        super().__init__()
        self.tokens, self.words = config.token_indices, site.inputs
        if not self.tokens or max(self.tokens) >= self.words:
            raise AdapterError(
                f"add_adapter(TrainableTokensConfig(token_indices={self.tokens})): the model has embeddings for the "
                f"tokens 0 to {self.words - 1}; name one at least. For new tokens call resize_token_embeddings first."
            )
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self.delta = nn.Parameter(torch.zeros(len(self.tokens), site.outputs, dtype=dtype))
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def numbers(self) -> tuple[Tensor, Tensor]:
        """(n,) the tokens, and (words,) the row of D for each word, n where there is none."""
        device = self.delta.device
        if device not in self._on:
            tokens = torch.tensor(self.tokens, device=device)
            rows = torch.full((self.words,), len(self.tokens), device=device)
            rows[tokens] = torch.arange(len(self.tokens), device=device)
            self._on[device] = tokens, rows
        return self._on[device]


class TokenChanges(AdapterModule[Any]):
    """A place where the changes of some tokens act; they are the adapter's shared module."""

    container = "trainable_tokens"

    def __init__(self, config: TrainableTokensConfig, site: Any, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.site = site
        self._shared = (cast(Changes, shared),)  # in a tuple, so that it is registered once, at the base model

    @classmethod
    def wants(cls, config: TrainableTokensConfig, site: Any) -> bool:
        """At the only one."""
        return True

    @property
    def changes(self) -> Changes:
        """What all places share."""
        return self._shared[0]


@register(TrainableTokensConfig, LookupSite)
class TokensAtLookup(TokenChanges):
    """y = E[i] + D[n] for the n-th trained token i, y = E[i] for all others

    PEFT's TrainableTokens, which keeps E[i] + D[n] in place of D: weight decay here leads back to E.

    Site: LookupSite. Parameters, shared: delta = D (n, d). Start: identity (D = 0). Merges: yes.
    """

    @classmethod
    def share(cls, config: TrainableTokensConfig, sites: Sequence[Any]) -> nn.Module:
        """D."""
        return Changes(config, sites[0])

    def forward(self, signal: LookupSignal) -> LookupSignal:
        """See the class."""
        delta = self.changes.delta
        rows = torch.cat([delta, delta.new_zeros(1, delta.shape[1])])
        change = embedding(self.changes.numbers()[1][signal.ids], rows) * signal.factor
        return replace(signal, output=signal.output + change.to(signal.output.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """E^T with D added to the columns of the tokens."""
        return weight.index_add(1, self.changes.numbers()[0], self.changes.delta.T.to(weight.dtype))


@register(TrainableTokensConfig, OutputSite)
class TokensAtOutput(TokenChanges):
    """y = Wx + D x at the trained tokens, where W is tied to the embeddings; elsewhere nothing.

    Site: OutputSite. Parameters: those of TokensAtLookup. Start: identity. Merges: yes, with the embeddings.
    """

    def forward(self, signal: OutputSignal) -> OutputSignal:
        """See the class."""
        if not signal.tied:
            return signal
        delta = self.changes.delta
        change = linear(signal.x.to(delta.dtype), delta).to(signal.output.dtype)
        return replace(signal, output=signal.output.index_add(-1, self.changes.numbers()[0], change))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W, into which the embeddings' change was merged if the two are tied."""
        return weight
