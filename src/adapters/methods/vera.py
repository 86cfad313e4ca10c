"""VeRA: a low-rank change whose random matrices are shared and whose scaling vectors are learned."""

from dataclasses import dataclass

from ..configuration.registry import register_config, register_preset
from .lora import LoRAConfig


@dataclass(eq=False)
class VeraConfig(LoRAConfig):
    """Learned vectors between shared random matrices. Kopiczko et al. 2024, arXiv:2310.11454."""

    init_weights: str = "vera"
    vera_d: float | None = 0.1
    vera_b: float | None = 0.0


def is_vera(config: LoRAConfig) -> bool:
    """Whether a configuration of the LoRA family is VeRA (or DvoRA)."""
    return config.vera_d is not None or config.vera_b is not None


register_preset(VeraConfig, LoRAConfig, is_vera)
register_config("vera", VeraConfig())
