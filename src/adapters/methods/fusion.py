"""AdapterFusion: attention over the outputs of several adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_fraction
from ..configuration.files import read_config_file
from ..context import report
from ..derived import Derived
from ..errors import ConfigError, suggestion
from ..sharded import whole
from ..signals import SublayerSignal
from .bottleneck import Bottleneck


@dataclass(eq=False)
class AdapterFusionConfig(AdapterConfig):
    """Attention over the outputs of several adapters. Pfeiffer et al. 2021, arXiv:2005.00247.

    ``key``, ``query`` and ``value`` give the attention learned projections, ``value_before_softmax`` projects the
    values before it and not its result, ``value_initialized`` starts that projection near the identity.
    ``dropout_prob`` acts on the attention scores; None takes that of the model's attention.

    Raises:
        ConfigError: a field is unknown or missing, or its value is not allowed.
    """

    key: bool
    query: bool
    value: bool
    query_before_ln: bool
    regularization: bool
    residual_before: bool
    temperature: bool
    value_before_softmax: bool
    value_initialized: bool
    dropout_prob: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_prob is not None:
            check_fraction(self, "dropout_prob")
        if self.modules is not None:
            raise self.refusal("modules", "not possible here", "a fusion sits where its adapters do: it must be None")

    @staticmethod
    def load(
        config: Mapping[str, Any] | str | None, download_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> "AdapterFusionConfig":
        """The fusion configuration that ``config`` stands for, with the fields in ``kwargs`` changed.

        ``config`` is ``"static"``, ``"dynamic"``, a dictionary, the path of a JSON file or a configuration; None is the
        default. A keyword argument that is None changes nothing. ``download_kwargs`` has no effect.

        Raises:
            ConfigError: ``config`` is none of these, a field is unknown or a value is not allowed.

        Example:
            >>> AdapterFusionConfig.load("static", dropout_prob=0.0).dropout_prob
            0.0
        """
        values = _fusion_values(DEFAULT_ADAPTERFUSION_CONFIG if config is None else config)
        changes = {name: value for name, value in kwargs.items() if value is not None}
        return AdapterFusionConfig.from_dict({**values, **changes})


def _fusion_values(config: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(config, AdapterConfig) and not isinstance(config, AdapterFusionConfig):
        raise ConfigError(
            f"AdapterFusionConfig.load({type(config).__name__}): it configures an adapter; "
            "a fusion takes 'static', 'dynamic' or an AdapterFusionConfig."
        )
    if not isinstance(config, str):
        return config
    found = ADAPTERFUSION_CONFIG_MAP[config] if config in ADAPTERFUSION_CONFIG_MAP else read_config_file(config)
    if found is None:
        raise ConfigError(
            f"AdapterFusionConfig.load({config!r}): Invalid AdapterFusion config identifier {config!r}; "
            + suggestion(config, ADAPTERFUSION_CONFIG_MAP)
        )
    return found


@dataclass(eq=False)
class StaticAdapterFusionConfig(AdapterFusionConfig):
    """Fusion without a learned projection of the values."""

    key: bool = True
    query: bool = True
    value: bool = False
    query_before_ln: bool = False
    regularization: bool = False
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = False
    dropout_prob: float | None = None


@dataclass(eq=False)
class DynamicAdapterFusionConfig(AdapterFusionConfig):
    """Fusion with a learned projection of the values, regularised towards the identity."""

    key: bool = True
    query: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    dropout_prob: float | None = None


ADAPTERFUSION_CONFIG_MAP: dict[str, AdapterFusionConfig] = {
    "static": StaticAdapterFusionConfig(),
    "dynamic": DynamicAdapterFusionConfig(),
}
"""The fusion configuration of each identifier; the instances are shared."""

DEFAULT_ADAPTERFUSION_CONFIG = "dynamic"
"""The identifier that stands for no fusion configuration."""


class Fusion(nn.Module):
    """h' = sum_i p_i V u_i + residual, p = softmax_i((Q x) . (K u_i) / T)

    Attention over the updates u_i of several adapters at one sub-layer. Pfeiffer et al. 2021, arXiv:2005.00247, eq. 3.
    x is the input of the last adapter, or with ``query_before_ln`` the sub-layer's output.

    Parameters: query and key (d, d) with bias, value (d, d). Start: value near the identity if ``value_initialized``.
    Differs from 1.x: the temperature falls only while training and is part of the state; a dropout of 0 is 0;
    ``regularization=False`` switches the regularisation off.
    """

    def __init__(self, config: AdapterFusionConfig, width: int, attention_dropout: float) -> None:
        super().__init__()
        self.config = config
        self.query = _projection(width, True) if config.query else None
        self.key = _projection(width, True) if config.key else None
        self.value = _projection(width, False) if config.value else None
        if self.value is not None and config.value_initialized:
            with torch.no_grad():
                self.value.weight.fill_(1e-6)
                self.value.weight.fill_diagonal_(1.0)
        self.dropout = attention_dropout if config.dropout_prob is None else config.dropout_prob
        if config.temperature:
            self.register_buffer("temperature", torch.tensor(50.0))
        self.temperature: Tensor
        self._derived = Derived()
        self.name, self.layer, self.location, self.order = "", -1, "", 0

    def forward(self, signal: SublayerSignal, outputs: list[SublayerSignal], last: Bottleneck) -> SublayerSignal:
        """signal: what enters the sub-layer's adapters; outputs: what each made of it; last: the one that prepares."""
        config = self.config
        hidden, residual = last.prepare(signal)
        own = [output.update for output in outputs if output.update is not None]
        updates = torch.stack(own, 2)  # (b, s, n, d)
        values = updates + residual[:, :, None] if config.residual_before else updates
        query = self._asker(signal, hidden, last)
        query = query if self.query is None else self.query(query)
        keys = updates if self.key is None else self.key(updates)
        weights = self._weights(torch.einsum("bsd,bsnd->bsn", query, keys), signal.rows)
        if config.value_before_softmax and self.value is not None:
            values = self.value(values)
        context = torch.einsum("bsn,bsnd->bsd", weights, values)
        if not config.value_before_softmax and self.value is not None:
            context = self.value(context)
        return self._concluded(signal, context, residual, last)

    @staticmethod
    def joins(modules: Sequence[Any], signal: SublayerSignal) -> bool:
        """Whether ``joint`` is possible: plain bottlenecks that prepare alike, of the dtype of the hidden states."""
        return (
            all(isinstance(module, Bottleneck) and module.is_plain for module in modules)
            and len({module.preparation for module in modules}) == 1
            and all(module.adapter_up.weight.dtype == signal.hidden.dtype for module in modules)
        )

    def joint(self, signal: SublayerSignal, modules: Sequence[Bottleneck]) -> SublayerSignal:
        """As ``forward``, in the adapters' inner spaces: u_i = U_i z_i + b_i is never computed.

        q . K u_i = (U_i^T K^T q) . z_i and sum_i p_i V u_i = (V U) (p z), with the U_i side by side and the p_i z_i one
        below the other, so that the number of adapters hardly counts.
        """
        last, config, sizes = modules[-1], self.config, [module.adapter_up.in_features for module in modules]
        hidden, residual = last.prepare(signal)
        (down, down_bias), (up, up_bias) = self._side_by_side(modules)
        inner = last.adapter_down[-1](linear(hidden, down, down_bias))
        query, constant = self._key_space(self._asker(signal, hidden, last))
        scores = _sums(linear(query, up.T) * inner, sizes) + linear(query, up_bias)
        weights = self._weights(scores if constant is None else scores + constant, signal.rows)
        spread = weights.repeat_interleave(torch.tensor(sizes, device=weights.device), -1, output_size=sum(sizes))
        context = linear(spread * inner, up) + weights @ up_bias
        if self.value is not None:
            context = self.value(context + residual if config.residual_before else context)
        elif config.residual_before:
            context = context + residual
        return self._concluded(signal, context, residual, last)

    def _asker(self, signal: SublayerSignal, hidden: Tensor, last: Bottleneck) -> Tensor:
        before_norm = self.config.query_before_ln and not last.config.is_parallel
        return signal.hidden if before_norm else hidden

    def _concluded(self, signal: SublayerSignal, context: Tensor, residual: Tensor, last: Bottleneck) -> SublayerSignal:
        output = context if self.config.residual_before else context + residual
        return last.concluded(replace(signal, hidden=output, update=context))

    def _side_by_side(self, modules: Sequence[Bottleneck]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """All D one below the other with their biases; all U beside each other, with their biases (n, d)."""
        parameters = [tensor for module in modules for tensor in module.parameters()]

        def join() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
            downs, down_biases = zip(*(module.down for module in modules), strict=True)
            ups, up_biases = zip(*(module.up for module in modules), strict=True)
            return (torch.cat(downs), torch.cat(down_biases)), (torch.cat(ups, 1), torch.stack(up_biases))

        return self._derived.get(tuple(map(id, modules)), parameters, join)

    def _key_space(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """K^T (Q x) and, where it is not the same for all adapters to the end, (Q x) . b_K."""
        query, key = self.query, self.key
        if query is None or key is None:
            x = x if query is None else query(x)
            return (x, None) if key is None else (x @ key.weight, self._constant(x))
        parameters = [query.weight, query.bias, key.weight]
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if trained or self.training:
            asked = query(x)
            return asked @ key.weight, self._constant(asked)
        both, bias = self._derived.get(
            "query", parameters, lambda: (key.weight.T @ query.weight, query.bias @ key.weight)
        )
        return linear(x, both, bias), None

    def _constant(self, query: Tensor) -> Tensor | None:
        """The softmax takes what all scores share away, unless dropout comes first."""
        dropped = self.training and self.dropout and self.key is not None
        return (query @ self.key.bias)[..., None] if dropped and self.key is not None else None

    def _weights(self, scores: Tensor, rows: Tensor | None) -> Tensor:
        """(b, s, n) the weight of each adapter at each position."""
        scores = nn.functional.dropout(scores, self.dropout, self.training)
        if self.config.temperature:
            scores = scores / self.temperature
            if self.training:
                with torch.no_grad():
                    self.temperature.sub_(0.05).clamp_(min=1.0)
        weights = scores.softmax(-1)
        report("fusion_attentions", self, weights, rows)
        return weights

    def regularisation(self) -> Tensor | None:
        """0.01 ||I - V||^2, if the configuration asks for it and the values are projected and trained."""
        if not self.config.regularization or self.value is None or not self.value.weight.requires_grad:
            return None
        weight = whole(self.value.weight)
        identity = torch.eye(self.value.out_features, device=weight.device, dtype=weight.dtype)
        return 0.01 * (identity - weight).pow(2).sum()


def _sums(products: Tensor, sizes: list[int]) -> Tensor:
    """(b, s, n) the sums over consecutive parts of these sizes of (b, s, sum of sizes)."""
    if len(set(sizes)) == 1:
        return products.view(*products.shape[:-1], len(sizes), sizes[0]).sum(-1)
    return torch.stack([part.sum(-1) for part in torch.split(products, sizes, -1)], -1)


def _projection(width: int, bias: bool) -> nn.Linear:
    projection = nn.Linear(width, width, bias=bias)
    nn.init.normal_(projection.weight, std=0.02)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection
