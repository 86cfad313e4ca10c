"""AdapterFusion: attention over the outputs of several adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_fraction
from ..configuration.files import read_config_file
from ..context import current
from ..errors import ConfigError, suggestion
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
        self.name, self.layer, self.location = "", -1, ""

    def forward(self, signal: SublayerSignal, outputs: list[SublayerSignal], last: Bottleneck) -> SublayerSignal:
        """signal: what enters the sub-layer's adapters; outputs: what each made of it; last: the one that prepares."""
        config = self.config
        hidden, residual = last.prepare(signal)
        own = [output.update for output in outputs if output.update is not None]
        updates = torch.stack(own, 2)  # (b, s, n, d)
        values = updates + residual[:, :, None] if config.residual_before else updates
        before_norm = config.query_before_ln and not last.config.is_parallel
        scores = self._scores(signal.hidden if before_norm else hidden, updates)
        if config.value_before_softmax and self.value is not None:
            values = self.value(values)
        context = torch.einsum("bsn,bsnd->bsd", scores, values)
        if not config.value_before_softmax and self.value is not None:
            context = self.value(context)
        output = context if config.residual_before else context + residual
        return last.concluded(replace(signal, hidden=output, update=context))

    def _scores(self, query: Tensor, updates: Tensor) -> Tensor:
        """(b, s, n) the weight of each adapter at each position."""
        query = query if self.query is None else self.query(query)
        keys = updates if self.key is None else self.key(updates)
        scores = torch.einsum("bsd,bsnd->bsn", query, keys)
        scores = nn.functional.dropout(scores, self.dropout, self.training)
        if self.config.temperature:
            scores = scores / self.temperature
            if self.training:
                with torch.no_grad():
                    self.temperature.sub_(0.05).clamp_(min=1.0)
        weights = scores.softmax(-1)
        forward = current()
        if forward is not None and forward.record is not None and forward.record.fusion_attentions is not None:
            forward.record.fusion_attentions[self.name][self.layer][self.location].append(weights.detach())
        return weights

    def regularisation(self) -> Tensor | None:
        """0.01 ||I - V||^2, if the configuration asks for it and the values are projected and trained."""
        if not self.config.regularization or self.value is None or not self.value.weight.requires_grad:
            return None
        identity = torch.eye(self.value.out_features, device=self.value.weight.device, dtype=self.value.weight.dtype)
        return 0.01 * (identity - self.value.weight).pow(2).sum()


def _projection(width: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(width, width, bias=bias)
    nn.init.normal_(linear.weight, std=0.02)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
