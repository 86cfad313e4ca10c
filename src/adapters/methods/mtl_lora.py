"""MTL-LoRA: LoRA with a matrix of its own for each task and several up-projections."""

from dataclasses import dataclass

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_choice, check_integer, check_number
from ..configuration.registry import register_architecture, register_config
from .lora import LoRAConfig


class MultiTaskConfig(AdapterConfig):
    """Marks configurations whose adapters share parameters between tasks."""


@dataclass(eq=False)
class MTLLoRAConfig(LoRAConfig, MultiTaskConfig):
    """LoRA for several tasks at once. Yang et al. 2024, arXiv:2410.09437.

    ``n_up_projection`` is the number of shared up-projections, mixed per task by a softmax with temperature
    ``weights_sharpness``. Each task has a matrix between down- and up-projection, diagonal (``"singular_values"``)
    or full (``"linear"``).

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "mtl_lora"
    n_up_projection: int = 1
    task_specific_matrix_type: str = "singular_values"
    weights_sharpness: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "n_up_projection", least=1)
        check_choice(self, "task_specific_matrix_type", ("singular_values", "linear"))
        check_number(self, "weights_sharpness", above=0)


register_architecture("mtl_lora", MTLLoRAConfig)
register_config("mtl_lora", MTLLoRAConfig())
