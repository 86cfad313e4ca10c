"""RoAd: pairs of a linear map's outputs are rotated and scaled."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.checks import check_choice, check_integer
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..errors import AdapterError
from ..grouping import Group, per_row
from ..method import register, seeded
from ..signals import LinearSignal
from ..sites import LinearSite
from .linear_method import LinearMethod, LinearMethodConfig

SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""How many angles each variant has for one output."""


@dataclass(eq=False)
class RoAdConfig(LinearMethodConfig):
    """Rotations of pairs of outputs of linear maps. Liao and Monz 2024, arXiv:2409.00119.

    ``variant``: ``"road_1"`` has one angle and one scale for a pair, ``"road_2"`` one for each of its two outputs,
    ``"road_4"`` one for each entry of its 2 x 2 matrix. Outputs are taken in groups of ``group_size``; in each the i-th
    of the first half and the i-th of the second half are a pair. ``init_weights=False`` starts from random values.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "road"
    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "variant", SIZES)
        check_integer(self, "group_size", least=2)
        if self.group_size % 2:
            raise self.refusal("group_size", "odd", "it must be even, since a group is made of pairs")


register_architecture("road", RoAdConfig)
register_config("road", RoAdConfig())


@register(RoAdConfig, LinearSite)
class RoAd(LinearMethod):
    """y = R (Wx + b), where R makes of a pair (h, k) (a_1 cos(t_1) h - a_2 sin(t_2) k, a_3 sin(t_3) h + a_4 cos(t_4) k)

    2D rotary adaptation. Liao and Monz 2024, arXiv:2409.00119, eq. 4. In ``road_1`` the four angles t and scales a are
    equal, in ``road_2`` those of the first and those of the second output.

    Site: LinearSite. Parameters: road_theta, road_alpha (out / 2, out or 2 out). Start: identity (t = 0, a = 1).
    Merges: yes, with the bias. In a Stack it turns the outputs that are there, those of the adapters before it too.
    """

    def __init__(self, config: RoAdConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.config, self.pairs = config, config.group_size // 2
        if site.outputs % config.group_size:
            raise AdapterError(
                f"add_adapter(config=RoAdConfig(group_size={config.group_size})): the map at {site.path} has "
                f"{site.outputs} outputs, which is no multiple of it; choose an even divisor of {site.outputs}."
            )
        size = int(site.outputs * SIZES[config.variant])
        self.road_theta, self.road_alpha = self.new(size), self.new(size)
        self._kept = Derived()
        with seeded(config.init_weights_seed):
            std = 0.0 if config.init_weights else 0.5
            nn.init.normal_(self.road_theta, std=std)
            nn.init.normal_(self.road_alpha, mean=1.0, std=std)

    def _columns(self, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(..., out) the factors of each output and of its partner."""
        groups = (*theta.shape[:-1], -1, 2, self.pairs)
        if self.config.variant == "road_4":
            cosines, sines = theta.reshape(*groups[:-1], 2 * self.pairs).unbind(-2)
            scale, other_scale = alpha.reshape(*groups[:-1], 2 * self.pairs).unbind(-2)
        else:
            scale = other_scale = alpha.reshape(*groups[:-2], self.pairs)
            cosines = sines = theta.reshape(*groups[:-2], self.pairs)
        own, other = scale * cosines.cos(), other_scale * sines.sin()
        if self.config.variant == "road_1":
            return torch.stack((own, own), -2).flatten(-3), torch.stack((-other, other), -2).flatten(-3)
        first, second = other.reshape(groups).unbind(-2)
        return own.flatten(-2), torch.stack((-first, second), -2).flatten(-3)

    def _partners(self, values: Tensor) -> Tensor:
        """(..., out) for each output the value of the other one of its pair."""
        return values.reshape(*values.shape[:-1], -1, 2, self.pairs).roll(1, -2).view(values.shape)

    def columns(self) -> tuple[Tensor, Tensor]:
        """(out) each, the factors of every output and of its partner."""
        parameters = [self.road_theta, self.road_alpha]
        return self._kept.get("columns", parameters, lambda: self._columns(*parameters))

    def turned(self, values: Tensor) -> Tensor:
        """R times values (..., out), of the dtype of the values."""
        own, other = self.columns()
        wide = values.to(own.dtype)
        return torch.addcmul(wide * own, self._partners(wide), other).to(values.dtype)

    def forward(self, signal: LinearSignal) -> LinearSignal:
        """See the class."""
        return signal.giving(self.turned(signal.output))

    def group_key(self) -> Hashable:
        """Of one variant and group size."""
        return self.config.variant, self.pairs, self.road_theta.shape, self.road_theta.dtype

    @classmethod
    def grouped(cls, group: Group, signal: LinearSignal, index: Tensor | None) -> LinearSignal:
        """See the class."""
        one: Any = group.modules[0]
        columns = one._columns(group.stacked("road_theta"), group.stacked("road_alpha"))
        own, other = (per_row(column, index, len(signal))[:, None] for column in columns)
        wide = signal.output.to(own.dtype)
        output = torch.addcmul(wide * own, one._partners(wide), other)
        return signal.giving(output.to(signal.output.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """R W."""
        return self.turned(weight.T).T

    def merged_bias(self, bias: Tensor) -> Tensor:
        """R b."""
        return self.turned(bias)
