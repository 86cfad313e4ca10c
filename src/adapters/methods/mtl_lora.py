"""MTL-LoRA: LoRA with a matrix of its own for each task and several up-projections."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_choice, check_integer, check_number
from ..configuration.registry import register_architecture, register_config
from ..derived import Derived
from ..method import register
from ..sites import LinearSite
from .dora import Magnitude
from .lora import LoRAConfig, LowRankChange
from .lora_init import initialise


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
        if self.composition_mode == "scale":
            raise self.refusal("composition_mode", "not possible here", "MTL-LoRA adds its change: it must be 'add'")
        for name in ("vera_d", "vera_b"):
            if self[name] is not None:
                raise self.refusal(name, "not possible here", "MTL-LoRA trains its matrices: it must be None")

    @property
    def variant(self) -> str:
        """Which kind of change the fields describe: "mtl_lora" or "mtl_dora"."""
        return "mtl_dora" if self.use_dora else "mtl_lora"


register_architecture("mtl_lora", MTLLoRAConfig)
register_config("mtl_lora", MTLLoRAConfig())


class TaskMatrix(nn.Module):
    """The matrix (r, r) of one task, or its diagonal (r,); it starts as the identity."""

    def __init__(self, config: MTLLoRAConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        identity = torch.eye(config.r, dtype=dtype)
        diagonal = config.task_specific_matrix_type == "singular_values"
        self.values = nn.Parameter(identity.diagonal().clone() if diagonal else identity)

    def after(self, up: Tensor) -> Tensor:
        """up (out, r) times the matrix, by which rows are multiplied from the right."""
        return up * self.values if self.values.dim() == 1 else up @ self.values.T


@register(MTLLoRAConfig, LinearSite)
class MTLLoRA(LowRankChange):
    """y = Wx + (alpha / r) sum_i softmax(w / T)_i B_i Λ A x

    LoRA with n up-projections that each task mixes in its own way, and a matrix Λ of the task. Yang et al. 2024,
    arXiv:2410.09437, section 3. A and B may be shared between adapters, each a task: see ``share_parameters``.

    Site: LinearSite. Parameters: lora_A (r, in), lora_B (n, out, r), weights = w (n,), task_specific.values = Λ (r,)
    or (r, r), gate (1, in).
    Start: identity (lora_B = 0, Λ = 1). Merges: yes, unless gated.
    Differs from 1.x: a full Λ works; with ``use_dora`` it has a magnitude; a gated one is scaled by alpha / r too.
    """

    variant = "mtl_lora"
    common = ("lora_A", "lora_B")
    config: MTLLoRAConfig

    def __init__(self, config: MTLLoRAConfig, site: LinearSite, shared: Any = None) -> None:
        super().__init__(config, site, shared)
        self.lora_A = nn.Parameter(torch.empty(config.r, site.inputs, dtype=self.dtype))
        self.lora_B = nn.Parameter(torch.empty(config.n_up_projection, site.outputs, config.r, dtype=self.dtype))
        initialise(self.lora_A, config.init_weights, zero=False)
        for up in self.lora_B.detach():
            initialise(up, config.init_weights, zero=True)
        self.task_specific = TaskMatrix(config, self.dtype)
        self.weights = nn.Parameter(torch.ones(config.n_up_projection, dtype=self.dtype))
        self._kept = Derived()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and sum_i softmax(w / T)_i B_i Λ."""
        up = self._kept.get("up", self.sources(), self.mixed)
        return self.lora_A, up

    def sources(self) -> list[Tensor]:
        """See the base."""
        return [*super().sources(), self.task_specific.values]

    def mixed(self) -> Tensor:
        """The up-projection of the task (out, r)."""
        shares = torch.softmax(self.weights / self.config.weights_sharpness, 0)
        return self.task_specific.after(torch.tensordot(shares, self.lora_B, 1))


@register(MTLLoRAConfig, LinearSite)
class MTLDoRA(Magnitude, MTLLoRA):
    """MTL-LoRA with the magnitude of DoRA

    Site: LinearSite. Parameters: those of MTL-LoRA, m.weight (out, 1).
    Start: identity. Merges: yes, unless gated.
    """

    variant = "mtl_dora"
