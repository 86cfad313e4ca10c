"""Adapters and heads whose weights are an average of others'."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .configuration.base import AdapterConfig
from .errors import AdapterError, ConfigError, UnknownAdapterError, check_type, listing
from .methods.ia3 import IA3
from .methods.lora import LoRA, LoRAConfig
from .mixing import MIXINGS, Mixing

if TYPE_CHECKING:
    from .model import ModelAdaptersMixin

SVD = "lora_delta_w_svd"
CHANGES = {SVD: "linear"} | {f"lora_delta_w_{name}_svd": name for name in MIXINGS if name != "linear"}
"""Strategies that mix the changes of weights, ΔW, and take the nearest of a rank, with how they are mixed."""
STRATEGIES = ("linear", "lora_linear_only_negate_b", "lora_linear", "lora_cat", *list(MIXINGS)[1:], *CHANGES)
OF_PEFT = {"cat": "lora_cat"} | {name.removeprefix("lora_delta_w_"): name for name in CHANGES}
"""PEFT's names; its "linear" is "lora_linear", since 1.x has another of that name."""
WITHOUT_EFFECT = ("dropout", "init_weights")
"""Fields in which averaged adapters may differ."""
SCALES = ("alpha", "use_rslora", "alpha_pattern")
RANKS = ("r", "rank_pattern")


@dataclass(frozen=True)
class Shares:
    """What is averaged, and the weight of each."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls, asked: str, names: Any, weights: Sequence[float] | None, normalize: bool, by_mean: bool = False
    ) -> Shares:
        """From a list of names and one of weights, or from a mapping of names to weights.

        normalize: divide the weights by their sum, or `by_mean` by their mean.

        Raises:
            AdapterError: there are no names, not as many weights, or weights of sum 0 that are to be normalised.
        """
        check_type(f"{asked}: names", names, Iterable, "a list of names, or a dict of weights by name")
        check_type(f"{asked}: weights", weights, (Iterable, NoneType), "a number for each, or None")
        if isinstance(names, Mapping):
            names, weights = list(names), list(names.values()) if weights is None else weights
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise AdapterError(f"{asked}: {names!r} is no list of names; give one, or a dict of weights by name.")
        if not names:
            raise AdapterError(f"{asked}: No adapters to average. Please provide at least one adapter to average.")
        whole = len(names) if by_mean else 1
        found = [whole / len(names)] * len(names) if weights is None else list(weights)
        if len(found) != len(names) or not all(isinstance(weight, int | float) for weight in found):
            raise AdapterError(f"{asked}(weights={weights!r}): give one number for each of {listing(names)}.")
        if normalize:
            total = sum(found)
            if total == 0 or not math.isfinite(total):
                raise AdapterError(
                    f"{asked}(weights={weights!r}): their sum is {total}, they cannot be normalised; give others, or "
                    "normalize_weights=False."
                )
            found = [weight / total * whole for weight in found]
        return cls(tuple(names), tuple(found))

    def sum(self, tensors: Sequence[Tensor], absolute: bool = False) -> Tensor:
        """The weighted sum of tensors of one shape, with `absolute` by the weights' absolute values."""
        weights = [abs(weight) for weight in self.weights] if absolute else self.weights
        total = sum(tensor.float() * weight for tensor, weight in zip(tensors, weights, strict=True))
        return torch.as_tensor(total).to(tensors[0].dtype)

    def mean(
        self, states: Sequence[Mapping[str, Tensor]], mixing: Mixing | None = None, mixed: Container[str] = ()
    ) -> dict[str, Tensor]:
        """The weighted sum of state dicts; with a `mixing` of what is `mixed` in place of summed, all else being equal.

        Raises:
            AdapterError: they differ in what cannot be averaged, such as positions.
        """
        if any(state.keys() != states[0].keys() for state in states):
            raise AdapterError(
                f"Cannot average {listing(self.names)}: only some of them keep their start, as PiSSA does; make all "
                "with the same init_weights, or combine LoRAs by 'lora_cat' or 'lora_delta_w_svd'."
            )
        found: dict[str, Tensor] = {}
        for key, first in states[0].items():
            tensors = [state[key].to(first.device) for state in states]
            if mixing is not None and key in mixed:
                found[key] = mixing.of(tensors, self.weights).to(first.dtype)
            elif mixing is None and first.is_floating_point():
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
    """How the modules of adapters are combined: its name, the rank where it chooses one, and how values are dropped.

    Raises:
        ConfigError: there is no such strategy, or an option is missing, wrong, or has no effect.
    """

    name: str
    rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        asked = f"average_adapter(combine_strategy={self.name!r})"
        if self.kind not in STRATEGIES:
            raise ConfigError(
                f"{asked}: Invalid combine_strategy {self.name!r}. Must be one of {list(STRATEGIES)}, or PEFT's name "
                f"of one: {list(OF_PEFT)}."
            )
        if self.name == SVD and self.rank is None:
            raise ConfigError(f"average_adapter: svd_rank must be set when using {SVD!r}.")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(f"average_adapter(svd_rank={self.rank!r}): it must be a whole number of at least 1.")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ConfigError(
                f"{asked}: majority_sign_method {self.majority_sign_method!r} is not 'total' or 'frequency'."
            )
        drops, density = MIXINGS[self._mixed].drops, self.density
        if drops and not (isinstance(density, int | float) and not isinstance(density, bool) and 0 < density <= 1):
            raise ConfigError(
                f"{asked}: density is {density!r}; give the share of values to keep, above 0 and up to 1."
            )
        if not drops and density is not None:
            raise ConfigError(f"{asked}: it drops no values; leave out density={density!r}.")

    @property
    def kind(self) -> str:
        """The name of ours."""
        return OF_PEFT.get(self.name, self.name)

    @property
    def _mixed(self) -> str:
        return CHANGES.get(self.kind, self.kind if self.kind in MIXINGS else "linear")

    @property
    def mixing(self) -> Mixing:
        """How tensors are mixed."""
        by_count = self.majority_sign_method == "frequency"
        return replace(MIXINGS[self._mixed], density=self.density or 1.0, by_count=by_count)

    @property
    def free_fields(self) -> tuple[str, ...]:
        """The fields of a LoRA in which the adapters may differ."""
        if self.kind in CHANGES or self.kind == "lora_cat":
            return (*WITHOUT_EFFECT, *SCALES, *RANKS)
        return WITHOUT_EFFECT if self.kind in ("linear", "lora_linear_only_negate_b") else (*WITHOUT_EFFECT, *SCALES)

    def config(self, first: AdapterConfig, modules: Sequence[Sequence[nn.Module]]) -> AdapterConfig:
        """The configuration of the combination, given that of the first adapter and the modules at each place."""
        loras = [[module for module in each if isinstance(module, LoRA)] for each in modules]
        if not isinstance(first, LoRAConfig) or not all(map(_is_plain, chain(*modules))):
            return first
        if self.kind == "lora_cat":
            rank = max(sum(len(module.factors()[0]) for module in each) for each in loras)
            return first.replace(r=rank, alpha=rank, **NO_PATTERNS)
        if self.kind in CHANGES:
            rank = self.rank or max(module.rank for module in chain(*loras))
            return first.replace(r=rank, alpha=first.alpha or rank, **NO_PATTERNS)
        if self.free_fields == WITHOUT_EFFECT:
            return first
        return first.replace(alpha=first.r, use_rslora=False, alpha_pattern=first.rank_pattern)  # a scale of 1

    def combine(self, shares: Shares, modules: Sequence[nn.Module], target: nn.Module) -> dict[str, Tensor]:
        """The state of `target` that combines those of `modules`.

        Raises:
            AdapterError: the strategy is not one for these modules.
        """
        if self.kind == "linear":
            return shares.mean([module.state_dict() for module in modules])
        if self.kind == "lora_linear_only_negate_b":
            return self._negating_b(shares, modules)
        loras = [module for module in modules if isinstance(module, LoRA) and _is_plain(module)]
        if len(loras) == len(modules) and isinstance(target, LoRA):
            found = self._of_loras(shares, loras, target)
        elif self.kind in MIXINGS:
            found = shares.mean(
                [module.state_dict() for module in modules], self.mixing, dict(target.named_parameters())
            )
        else:
            raise self._refusal(modules[0])
        return found

    def _negating_b(self, shares: Shares, modules: Sequence[nn.Module]) -> dict[str, Tensor]:
        states = [module.state_dict() for module in modules]
        fits = all(map(_is_plain, modules)) or all(isinstance(module, IA3) for module in modules)
        if not fits or any(set(state) - {"lora_A", "lora_B"} for state in states):
            raise self._refusal(modules[0])
        return {key: shares.sum([state[key] for state in states], key == "lora_A") for key in states[0]}

    def _of_loras(self, shares: Shares, modules: Sequence[LoRA], target: LoRA) -> dict[str, Tensor]:
        """A, B and bias of `target`, whose scale is 1 but where changes are mixed."""
        weights = [weight * module.scale for weight, module in zip(shares.weights, modules, strict=True)]
        found: dict[str, Tensor] = {}
        if self.kind in CHANGES:
            found |= self._nearest([module.scale * _product(module) for module in modules], shares, target)
        elif self.kind == "lora_cat":
            downs, ups = zip(*(module.factors() for module in modules), strict=True)
            found["lora_A"] = torch.cat([weight * down.float() for weight, down in zip(weights, downs, strict=True)])
            found["lora_B"] = torch.cat([up.float() for up in ups], 1)
        else:  # each factor has its share of the weight, and one of them the sign
            if any(module.start_A is not None for module in modules):
                raise self._refusal(modules[0])
            roots = [abs(weight) ** 0.5 for weight in weights]
            signed = [root if weight >= 0 else -root for root, weight in zip(roots, weights, strict=True)]
            found["lora_A"] = self.mixing.of([module.lora_A for module in modules], signed)
            found["lora_B"] = self.mixing.of([module.lora_B for module in modules], roots)
        missing = target.rank - len(found["lora_A"])  # a rank above that of the map, or of this place
        found["lora_A"] = pad(found["lora_A"], (0, 0, 0, missing))
        found["lora_B"] = pad(found["lora_B"], (0, missing))
        if target.bias is not None:
            biases = [module.bias for module in modules if module.bias is not None]
            found["bias"] = self.mixing.of(biases, [weight / target.scale for weight in weights])
        return {key: value.to(target.get_parameter(key).dtype) for key, value in found.items()}

    def _nearest(self, changes: Sequence[Tensor], shares: Shares, target: LoRA) -> dict[str, Tensor]:
        """A and B whose product, times the scale, is next to the mix of the changes."""
        left, sizes, right = torch.linalg.svd(self.mixing.of(changes, shares.weights), full_matrices=False)
        rank = target.rank
        return {"lora_A": right[:rank], "lora_B": left[:, :rank] * sizes[:rank] / target.scale}

    def _refusal(self, module: nn.Module) -> AdapterError:
        more = " and (IA)³" if self.kind == "lora_linear_only_negate_b" else ""
        return AdapterError(
            f"average_adapter: Combine strategy {self.name} not supported for the chosen adapter methods, which have a "
            f"{type(module).__name__}; it is for LoRA without gates{more}, and not for starts such as PiSSA's where it "
            "takes A and B apart. 'linear' is for every method."
        )


NO_PATTERNS: dict[str, Any] = {
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_weights": "lora",
}


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, LoRA) and module.gate is None and module.config.variant == "lora"


def _product(module: LoRA) -> Tensor:
    down, up = module.factors()
    return up.float() @ down.float()


@torch.no_grad()
def average_adapter(
    model: ModelAdaptersMixin, name: str, shares: Shares, strategy: Strategy, overwrite_ok: bool, set_active: bool
) -> None:
    """Add an adapter to `model` that combines those of `shares`; the strategies are in docs/merging.md.

    Raises:
        UnknownAdapterError: the model has no such adapter.
        AdapterError: the configurations differ in more than the strategy allows, the strategy is not one for the
            method, or the name is taken; nothing was changed then.
    """
    missing = [other for other in shares.names if other not in model.adapters_config]
    if missing:
        raise UnknownAdapterError(
            f"average_adapter({name!r}): Adapter {missing[0]} not found; it has {listing(model.adapters_config)}."
        )
    first = _common_config(model, name, shares, strategy)
    sources = [_modules(model, other) for other in shares.names]
    places = dict.fromkeys(chain(*sources))
    config = strategy.config(first, [[source[key] for source in sources if key in source] for key in places])
    candidate = f"{name}__average" if overwrite_ok and name in model.adapters_config else name
    model.add_adapter(candidate, config)
    try:
        states = {
            key: _combined(strategy, shares, [source.get(key) for source in sources], target)
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


def _combined(
    strategy: Strategy, shares: Shares, modules: Sequence[nn.Module | None], target: nn.Module
) -> dict[str, Tensor]:
    """At one place, where some of the adapters may have no module: their change is zero."""
    found = [(module, weight) for module, weight in zip(modules, shares.weights, strict=True) if module is not None]
    if not found:
        return target.state_dict()
    here = Shares(shares.names, tuple(weight for _, weight in found))
    return strategy.combine(here, [module for module, _ in found], target)


def _modules(model: ModelAdaptersMixin, name: str) -> dict[str, nn.Module]:
    """The modules of an adapter by their places."""
    sites = model.adapter_sites
    found: dict[str, nn.Module] = {site.path: module for site, module in sites.holding(name)}
    return found | {path.removesuffix(f".{name}"): module for path, module in sites.shared(name).items()}


def _common_config(model: ModelAdaptersMixin, name: str, shares: Shares, strategy: Strategy) -> AdapterConfig:
    configs = [model.adapters_config.get(other) for other in shares.names]
    members = [model.adapters_config.members(other) for other in shares.names]
    first = configs[0]
    if first is None or (len(members[0]) > 1 and strategy.kind != "linear"):
        raise AdapterError(
            f"average_adapter({name!r}): Combining adapters with ConfigUnion is only supported with the 'linear' "
            "combine_strategy."
        )
    free = strategy.free_fields
    compared = [[_comparable(config, free) for config in each] for each in members]
    if any(each != compared[0] for each in compared):
        raise AdapterError(
            f"average_adapter({name!r}): Cannot average adapters with different configurations. Please make sure all "
            f"adapters have the same configuration; {listing(shares.names)} differ in more than {listing(free)}."
        )
    return first


def _comparable(config: AdapterConfig, free: Container[str]) -> dict[str, Any]:
    ignored: Container[str] = free if isinstance(config, LoRAConfig) else WITHOUT_EFFECT
    return {"type": type(config), **{key: value for key, value in config.items() if key not in ignored}}
