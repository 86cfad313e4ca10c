"""Adapters and heads whose weights are an average of others'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .configuration.base import AdapterConfig
from .errors import AdapterError, ConfigError, UnknownAdapterError, listing
from .methods.ia3 import IA3
from .methods.lora import LoRA, LoRAConfig

if TYPE_CHECKING:
    from .model import ModelAdaptersMixin

STRATEGIES = ("linear", "lora_linear_only_negate_b", "lora_delta_w_svd")
WITHOUT_EFFECT = ("dropout", "init_weights")
"""Fields in which averaged adapters may differ."""


@dataclass(frozen=True)
class Shares:
    """What is averaged, and the weight of each."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, asked: str, names: Any, weights: Sequence[float] | None, normalize: bool) -> Shares:
        """From a list of names and one of weights, or from a mapping of names to weights.

        Raises:
            AdapterError: there are no names, not as many weights, or weights of sum 0 that are to be normalised.
        """
        if isinstance(names, Mapping):
            names, weights = list(names), list(names.values()) if weights is None else weights
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise AdapterError(f"{asked}: {names!r} is no list of names; give one, or a dict of weights by name.")
        if not names:
            raise AdapterError(f"{asked}: No adapters to average. Please provide at least one adapter to average.")
        found = [1 / len(names)] * len(names) if weights is None else list(weights)
        if len(found) != len(names) or not all(isinstance(weight, int | float) for weight in found):
            raise AdapterError(f"{asked}(weights={weights!r}): give one number for each of {listing(names)}.")
        if normalize:
            total = sum(found)
            if total == 0 or not math.isfinite(total):
                raise AdapterError(
                    f"{asked}(weights={weights!r}): their sum is {total}, they cannot be normalised; give others, or "
                    "normalize_weights=False."
                )
            found = [weight / total for weight in found]
        return cls(tuple(names), tuple(found))

    def sum(self, tensors: Sequence[Tensor], absolute: bool = False) -> Tensor:
        """The weighted sum of tensors of one shape, with `absolute` by the weights' absolute values."""
        weights = [abs(weight) for weight in self.weights] if absolute else self.weights
        total = sum(tensor.float() * weight for tensor, weight in zip(tensors, weights, strict=True))
        return torch.as_tensor(total).to(tensors[0].dtype)

    def mean(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The weighted sum of state dicts.

        Raises:
            AdapterError: they differ in what cannot be averaged, such as positions.
        """
        found: dict[str, Tensor] = {}
        for key, first in states[0].items():
            tensors = [state[key].to(first.device) for state in states]
            if first.is_floating_point():
                found[key] = self.sum(tensors)
            elif all(torch.equal(first, tensor) for tensor in tensors):
                found[key] = first
            else:
                raise AdapterError(
                    f"Cannot average {listing(self.names)}: they differ in {key!r}, which holds positions and not "
                    "weights; make them with the same init_weights_seed."
                )
        return found


@dataclass(frozen=True)
class Strategy:
    """How the modules of adapters are combined, and the rank for the one that chooses a rank.

    Raises:
        ConfigError: there is no such strategy, or its rank is missing.
    """

    name: str
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ConfigError(
                f"average_adapter(combine_strategy={self.name!r}): Invalid combine_strategy {self.name!r}. Must be one "
                f"of {list(STRATEGIES)}."
            )
        if self.name == "lora_delta_w_svd" and self.rank is None:
            raise ConfigError("average_adapter: svd_rank must be set when using 'lora_delta_w_svd'.")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"average_adapter(svd_rank={self.rank!r}): it must be a whole number of at least 1.")

    @property
    def is_linear(self) -> bool:
        """Whether every method can be combined so."""
        return self.name == "linear"

    def combine(self, shares: Shares, modules: Sequence[nn.Module], target: nn.Module) -> dict[str, Tensor]:
        """The state of `target` that combines those of `modules`.

        Raises:
            AdapterError: the strategy is not one for these modules.
        """
        if self.is_linear:
            return shares.mean([module.state_dict() for module in modules])
        plain = [module for module in modules if isinstance(module, LoRA) and module.gate is None]
        if self.name == "lora_linear_only_negate_b":
            if len(plain) < len(modules) and not all(isinstance(module, IA3) for module in modules):
                raise self._refusal(modules[0])
            states = [module.state_dict() for module in modules]
            if any(set(state) - {"lora_A", "lora_B"} for state in states):
                raise self._refusal(modules[0])
            return {key: shares.sum([state[key] for state in states], key == "lora_A") for key in states[0]}
        if len(plain) < len(modules) or not isinstance(target, LoRA):
            raise self._refusal(modules[0])
        return self._decomposed(shares, plain, target.scale)

    def _decomposed(self, shares: Shares, modules: Sequence[LoRA], scale: float) -> dict[str, Tensor]:
        """A and B of the given rank whose product, times `scale`, is next to the sum of the changes."""
        changes = [module.scale * (module.lora_B.float() @ module.lora_A.float()) for module in modules]
        left, sizes, right = torch.linalg.svd(shares.sum(changes), full_matrices=False)
        rank, like = self.rank or len(sizes), modules[0].lora_A
        down, up = right[:rank], left[:, :rank] * sizes[:rank] / scale
        missing = rank - len(down)  # a rank above the width of the map
        down = torch.nn.functional.pad(down, (0, 0, 0, missing)) if missing > 0 else down
        up = torch.nn.functional.pad(up, (0, missing)) if missing > 0 else up
        return {"lora_A": down.to(like.dtype), "lora_B": up.to(like.dtype)}

    def _refusal(self, module: nn.Module) -> AdapterError:
        return AdapterError(
            f"average_adapter: Combine strategy {self.name} not supported for the chosen adapter methods, which have a "
            f"{type(module).__name__}; it is for LoRA without gates{self._more}. 'linear' is for every method."
        )

    @property
    def _more(self) -> str:
        return " and (IA)³" if self.name == "lora_linear_only_negate_b" else ""


@torch.no_grad()
def average_adapter(
    model: ModelAdaptersMixin, name: str, shares: Shares, strategy: Strategy, overwrite_ok: bool, set_active: bool
) -> None:
    """Add an adapter to `model` whose tensors are averages of those of `shares`, with the first one's configuration.

    "linear": Σ w t for each tensor t; "lora_linear_only_negate_b": B = Σ w B, A = Σ |w| A; "lora_delta_w_svd": A and B
    of rank ``svd_rank`` next to Σ w (alpha / r) B A, by its singular values; alpha stays and the scale is made up for.

    Raises:
        UnknownAdapterError: the model has no such adapter.
        AdapterError: the configurations differ in more than dropout and start values, the strategy is not one for the
            method, or the name is taken; nothing was changed then.
    """
    missing = [other for other in shares.names if other not in model.adapters_config]
    if missing:
        raise UnknownAdapterError(
            f"average_adapter({name!r}): Adapter {missing[0]} not found; it has {listing(model.adapters_config)}."
        )
    config = _common_config(model, name, shares, strategy)
    candidate = f"{name}__average" if overwrite_ok and name in model.adapters_config else name
    model.add_adapter(candidate, config)
    try:
        sources = [_modules(model, other) for other in shares.names]
        states = {
            key: strategy.combine(shares, [source[key] for source in sources], target)
            for key, target in _modules(model, candidate).items()
        }
    except BaseException:
        model.delete_adapter(candidate)
        raise
    if candidate != name:
        model.delete_adapter(candidate)
        model.add_adapter(name, config, overwrite_ok=True)
    for key, target in _modules(model, name).items():
        target.load_state_dict(states[key])
    if set_active:
        model.base_model.set_active_adapters(name)


def _modules(model: ModelAdaptersMixin, name: str) -> dict[str, nn.Module]:
    """The modules of an adapter by their places."""
    sites = model.adapter_sites
    found: dict[str, nn.Module] = {site.path: module for site, module in sites.holding(name)}
    return found | {path.removesuffix(f".{name}"): module for path, module in sites.shared(name).items()}


def _common_config(model: ModelAdaptersMixin, name: str, shares: Shares, strategy: Strategy) -> AdapterConfig:
    configs = [model.adapters_config.get(other) for other in shares.names]
    members = [model.adapters_config.members(other) for other in shares.names]
    first = configs[0]
    if first is None or (len(members[0]) > 1 and not strategy.is_linear):
        raise AdapterError(
            f"average_adapter({name!r}): Combining adapters with ConfigUnion is only supported with the 'linear' "
            "combine_strategy."
        )
    if any(list(map(_comparable, each)) != list(map(_comparable, members[0])) for each in members):
        raise AdapterError(
            f"average_adapter({name!r}): Cannot average adapters with different configurations. Please make sure all "
            f"adapters have the same configuration; {listing(shares.names)} differ in more than dropout and "
            "init_weights."
        )
    if strategy.name == "lora_delta_w_svd" and isinstance(first, LoRAConfig):
        return first.replace(r=strategy.rank)
    return first


def _comparable(config: AdapterConfig) -> dict[str, Any]:
    return {"type": type(config), **{key: value for key, value in config.items() if key not in WITHOUT_EFFECT}}
