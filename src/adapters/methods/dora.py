"""DoRA and DvoRA: a linear map's direction changed by LoRA or VeRA, its magnitude by a learned vector."""

from dataclasses import dataclass

from ..configuration.registry import register_config, register_preset
from .lora import LoRAConfig
from .vera import is_vera


@dataclass(eq=False)
class DoRAConfig(LoRAConfig):
    """Magnitude and direction of a linear map, changed apart. Liu et al. 2024, arXiv:2402.09353."""

    use_dora: bool = True


@dataclass(eq=False)
class DvoRAConfig(DoRAConfig):
    """DoRA with the shared random matrices of VeRA. Liu et al. 2024, arXiv:2402.09353."""

    init_weights: str = "vera"
    vera_d: float | None = 0.1
    vera_b: float | None = 0.0


register_preset(DoRAConfig, LoRAConfig, lambda config: config.use_dora)
register_preset(DvoRAConfig, LoRAConfig, lambda config: config.use_dora and is_vera(config))
register_config("dora", DoRAConfig())
register_config("dvora", DvoRAConfig())
