"""(IA)³: learned vectors that scale the outputs of linear maps."""

from dataclasses import dataclass, field

from ..configuration.registry import register_config, register_preset
from .lora import LoRAConfig


@dataclass(eq=False)
class IA3Config(LoRAConfig):
    """Vectors that scale keys, values and the feed-forward activations. Liu et al. 2022, arXiv:2205.05638."""

    intermediate_lora: bool = True
    r: int = 1
    alpha: float = 1
    attn_matrices: list[str] = field(default_factory=lambda: ["k", "v"])
    composition_mode: str = "scale"
    init_weights: str = "ia3"


register_preset(IA3Config, LoRAConfig, lambda config: config.composition_mode == "scale")
register_config("ia3", IA3Config())
