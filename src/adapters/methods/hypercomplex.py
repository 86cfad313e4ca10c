"""Compacter's projections: linear maps that are sums of Kronecker products, and what the layers share of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..derived import Derived
from ..errors import AdapterError

if TYPE_CHECKING:
    from .bottleneck import BnConfig

OWN_RULE = 0.01
"""The spread of a rule that one projection has for itself."""


class Hypercomplex(nn.Module):
    """y = H^T x + b, H = sum_i kron(R_i, W_i), i = 1 … p

    A linear map of about 1/p of the parameters of a dense one. Zhang et al. 2021, arXiv:2102.08597, eq. 4. Compacter
    has low-rank W_i = left_i right_i and rules R_i that all layers share: Mahabadi et al. 2021, arXiv:2106.04647,
    section 3.

    Parameters: phm_rule (p, p, p), or phm_rule_left (p, p, 1) and phm_rule_right (p, 1, p); W (p, in/p, out/p), or
    W_left (p, in/p, k) and W_right (p, k, out/p); b (out,). What layers share is at the base model instead; a rule that
    is not learned is a buffer.
    Differs from 1.x: ``hypercomplex_nonlinearity`` says how W starts, ``init_weights`` keeps its meaning,
    ``learn_phm=False`` lasts, a shared W need not be factorised, shared tensors follow the seed.
    """

    def __init__(self, config: BnConfig, inputs: int, outputs: int, role: str, shared: nn.Module | None) -> None:
        """role: "down" or "up"; shared: what the adapter's projections have in common."""
        super().__init__()
        if inputs % config.phm_dim or outputs % config.phm_dim:
            raise AdapterError(
                f"add_adapter({type(config).__name__}): phm_dim={config.phm_dim} does not divide both {inputs} and "
                f"{outputs}, the widths of a projection; it must. Choose another phm_dim or reduction_factor."
            )
        if not config.shared_phm_rule:
            _add_rule(self, config, OWN_RULE, OWN_RULE)
        if not config.shared_W_phm:
            _add_weight(self, "W", config, inputs, outputs, role)
        self.b = nn.Parameter(torch.zeros(outputs)) if config.phm_bias else None
        # in tuples, so that what is shared is registered at the base model only
        self._rule = (shared if config.shared_phm_rule else self, "phm_rule")
        self._weight = (shared, f"W_{role}") if config.shared_W_phm else (self, "W")
        self._kept = Derived()

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in); returns (…, out)."""
        rule, weight = _factors(*self._rule), _factors(*self._weight)
        return linear(x, self._kept.get(None, rule + weight, lambda: _kronecker_sum(rule, weight)), self.b)

    @property
    def dtype(self) -> torch.dtype:
        """That of its parameters."""
        return _factors(*self._weight)[0].dtype


def projection(config: BnConfig, inputs: int, outputs: int, role: str, shared: nn.Module | None) -> nn.Module:
    """The map that `config` asks for; role: "down" or "up"."""
    if config.phm_layer:
        return Hypercomplex(config, inputs, outputs, role, shared)
    return nn.Linear(inputs, outputs)


class SharedByLayers(nn.Module):
    """What the projections of one adapter have in common: the rule, and W for all down and for all up projections."""

    def __init__(self, config: BnConfig, shapes: Sequence[tuple[int, int]]) -> None:
        """shapes: (width, width of the bottleneck) at each site."""
        super().__init__()
        if config.shared_phm_rule:
            _add_rule(self, config, config.phm_init_range, 1.0)
        if config.shared_W_phm:
            if len(set(shapes)) > 1:
                raise AdapterError(
                    f"add_adapter({type(config).__name__}(shared_W_phm=True)): the layers' bottlenecks differ in "
                    f"(width, inner width): {sorted(set(shapes))}; one shared W needs one shape. Use one "
                    "reduction_factor, leave layers out, or set shared_W_phm=False."
                )
            width, inner = shapes[0]
            _add_weight(self, "W_down", config, width, inner, "down")
            _add_weight(self, "W_up", config, inner, width, "up")


def _add_rule(owner: nn.Module, config: BnConfig, deviation: float, bound: float) -> None:
    """R of N(0, deviation^2) or U(-bound, bound)."""
    p = config.phm_dim
    shapes = {"phm_rule_left": (p, p, 1), "phm_rule_right": (p, 1, p)}
    shapes = shapes if config.factorized_phm_rule else {"phm_rule": (p, p, p)}
    for key, shape in shapes.items():
        rule = torch.empty(shape)
        rule = rule.normal_(std=deviation) if config.phm_c_init == "normal" else rule.uniform_(-bound, bound)
        if config.learn_phm:
            owner.register_parameter(key, nn.Parameter(rule))
        else:
            owner.register_buffer(key, rule)


def _add_weight(owner: nn.Module, name: str, config: BnConfig, inputs: int, outputs: int, role: str) -> None:
    p, k = config.phm_dim, config.phm_rank
    rows, columns = inputs // p, outputs // p
    shapes = {f"{name}_left": (p, rows, k), f"{name}_right": (p, k, columns)}
    shapes = shapes if config.factorized_phm_W else {name: (p, rows, columns)}
    for key, shape in shapes.items():
        owner.register_parameter(key, nn.Parameter(torch.empty(shape)))
    weights = [owner.get_parameter(key) for key in shapes]
    for weight in weights:
        _initialise(weight, config)
    if config.init_weights == "mam_adapter" and role == "up":
        nn.init.zeros_(weights[-1])


@torch.no_grad()
def _initialise(weight: Tensor, config: BnConfig) -> None:
    """As ``init_weights`` says if it is "houlsby", else as ``hypercomplex_nonlinearity``; weight: (p, in, out)."""
    if config.init_weights == "houlsby":
        nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
        return
    match config.hypercomplex_nonlinearity:
        case "glorot-uniform":
            for part in weight:
                nn.init.xavier_uniform_(part)
        case "glorot-normal":
            for part in weight:
                nn.init.xavier_normal_(part)
        case "normal":
            nn.init.normal_(weight, std=config.phm_init_range)
        case _:
            weight.copy_(_polar(weight.shape))


def _polar(shape: torch.Size) -> Tensor:
    """(p, in, out) hypercomplex numbers of p components in polar form, of random length and direction.

    Parcollet et al. 2019, arXiv:1806.04418, section 3.4: length u, phase t, W_1 = u cos t, W_i = u v_i sin t.
    """
    bound = 1 / math.sqrt(2 * (shape[1] + shape[2]))
    length = torch.empty(shape[1:]).uniform_(-bound, bound)
    phase = torch.empty(shape[1:]).uniform_(-math.pi, math.pi)
    axis = nn.functional.normalize(torch.randn(shape[0] - 1, *shape[1:]), dim=0)
    return torch.cat([(length * phase.cos())[None], length * phase.sin() * axis])


def _factors(owner: nn.Module | None, name: str) -> tuple[Tensor, ...]:
    """The tensor of that name, or the two whose product it is."""
    tensors: dict[str, Any] = {} if owner is None else {**owner._parameters, **owner._buffers}
    return (tensors[name],) if name in tensors else (tensors[f"{name}_left"], tensors[f"{name}_right"])


def _kronecker_sum(rule: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
    """H^T (out, in): the entry of output (b, l) and input (a, k) is sum_i R_i[a, b] W_i[k, l]."""
    rules, weights = (torch.bmm(*factors) if len(factors) == 2 else factors[0] for factors in (rule, weight))
    p, rows, columns = weights.shape
    return torch.einsum("iab,ikl->blak", rules, weights).reshape(p * columns, p * rows)
