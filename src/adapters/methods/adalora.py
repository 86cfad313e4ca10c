"""AdaLoRA: low-rank changes in the form of a singular value decomposition, whose ranks share one budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..configuration.checks import check_integer, check_number
from ..configuration.registry import register_architecture, register_config
from ..errors import AdapterError
from ..method import register, seeded
from ..sharded import set_whole, whole
from ..sites import LinearSite
from .linear_method import LinearUpdateConfig, LowRankUpdate

if TYPE_CHECKING:
    from ..model import ModelAdaptersMixin


@dataclass(eq=False)
class AdaLoRAConfig(LinearUpdateConfig):
    """Low-rank changes whose ranks are found in training. Zhang et al. 2023, arXiv:2303.10512.

    Every change starts with rank ``init_r``, scaled by ``alpha / init_r``. From step ``tinit`` on, every ``deltaT``
    steps, the least important triplets of all changes are set to zero; their number grows as a cubic until, ``tfinal``
    steps before ``total_step``, ``target_r`` are left on average. ``beta1`` and ``beta2`` smooth the importance and its
    uncertainty, ``orth_reg_weight`` weighs the orthogonality of the singular vectors in the loss. Without
    ``total_step`` an ``AdapterTrainer`` takes its own number of steps.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "adalora"
    init_r: int = 12
    target_r: int = 8
    alpha: float = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}.items():
            check_integer(self, name, least)
        if self.target_r > self.init_r:
            raise self.refusal(
                "target_r", f"above init_r={self.init_r}", "ranks only shrink: it must be at most init_r"
            )
        check_number(self, "alpha", above=0)
        for name in ("beta1", "beta2"):
            check_number(self, name, above=0)
            if self[name] >= 1:
                raise self.refusal(name, "out of range", "it must be between 0 and 1")
        check_number(self, "orth_reg_weight")
        if self.orth_reg_weight < 0:
            raise self.refusal("orth_reg_weight", "out of range", "it must be at least 0")
        if self.total_step is not None:
            check_integer(self, "total_step", least=1)
            if self.tinit + self.tfinal >= self.total_step:
                raise self.refusal("total_step", "too small", "it must be above tinit + tfinal")


register_architecture("adalora", AdaLoRAConfig)
register_config("adalora", AdaLoRAConfig())


@register(AdaLoRAConfig, LinearSite)
class AdaLoRA(LowRankUpdate):
    """y = Wx + (alpha / r) P Λ Q x

    Low-rank change as a singular value decomposition. Zhang et al. 2023, arXiv:2303.10512, eq. 3.

    Site: LinearSite. Parameters: lora_A = Q (r, in), lora_E = Λ (r, 1), lora_B = P (out, r). Buffer: kept (r,), which
    triplets the final budget has. Start: identity (Λ = 0). Merges: yes.
    """

    container = "loras"

    def __init__(self, config: AdaLoRAConfig, site: LinearSite, shared: nn.Module | None = None) -> None:
        super().__init__(config)
        self.config, rank = config, config.init_r
        self.scale = config.alpha / (rank + 1e-5)  # PEFT's, of which checkpoints have to compute the same
        self.lora_A, self.lora_E = self.new(rank, site.inputs), self.new(rank, 1)
        self.lora_B = self.new(site.outputs, rank)
        self.kept: Tensor
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        with seeded(config.init_weights_seed):
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)
        self._importance: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(self) -> tuple[Tensor, Tensor]:
        """Λ Q and (alpha / r) P."""
        return self.lora_A * self.lora_E, self.lora_B * self.scale

    def orthogonality(self) -> Tensor:
        """||Q Qᵀ - I|| + ||Pᵀ P - I||."""
        down, up = whole(self.lora_A), whole(self.lora_B)
        identity = torch.eye(len(down), dtype=down.dtype, device=down.device)
        rows, columns = down @ down.T, up.T @ up
        both: Tensor = (rows - identity).norm() + (columns - identity).norm()
        return both

    @torch.no_grad()
    def observe(self) -> None:
        """Smooth the sensitivity |w dL/dw| of every parameter, and its uncertainty; eq. 9 to 11 of the paper."""
        first, second = self.config.beta1, self.config.beta2
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            zero = torch.zeros_like(now)
            mean, deviation = self._importance.get(name, (zero, zero))
            mean = first * mean + (1 - first) * now
            deviation = second * deviation + (1 - second) * (now - mean).abs()
            self._importance[name] = mean, deviation

    def importance(self) -> Tensor:
        """(r,) of each triplet; eq. 8."""
        zero = torch.zeros_like(self.kept, dtype=self.lora_E.dtype)
        scores = {name: whole(mean * deviation) for name, (mean, deviation) in self._importance.items()}
        triplets = [scores["lora_E"][:, 0]] if "lora_E" in scores else [zero]
        triplets += [scores["lora_A"].mean(1)] if "lora_A" in scores else []
        triplets += [scores["lora_B"].mean(0)] if "lora_B" in scores else []
        return torch.stack(triplets).sum(0)

    @torch.no_grad()
    def keep(self, triplets: Tensor) -> None:
        """Set the singular values of all other triplets to zero; their gradients may bring them back."""
        set_whole(self.lora_E, whole(self.lora_E).masked_fill(~triplets[:, None], 0))


def budget(config: AdaLoRAConfig, step: int, total: int, modules: int) -> tuple[int, bool]:
    """How many triplets may stay after `step` of `total` steps, and whether this is a step to choose them; eq. 12."""
    start, goal = config.init_r * modules, config.target_r * modules
    last = total - config.tfinal
    if step <= config.tinit and step < last:
        return start, False
    if step >= last:
        return goal, True
    share = 1 - (step - config.tinit) / (last - config.tinit)
    return int((start - goal) * share**3 + goal), step % config.deltaT == 0


def update_and_allocate(model: ModelAdaptersMixin, global_step: int, total_step: int | None = None) -> None:
    """Share the budget out anew among the changes of each active AdaLoRA adapter.

    To be called in each step after ``backward`` and ``optimizer.step()`` and before ``zero_grad()``, with the number of
    steps done, from 1 on. ``AdapterTrainer`` does it.

    Args:
        model: with AdaLoRA adapters that are active and trained; others are left alone.
        global_step: the number of this step, 1 for the first one.
        total_step: how many there will be, where the configuration does not say so.

    Raises:
        AdapterError: nobody says how many steps there will be, or too few for a phase in which ranks shrink.

    Example:
        >>> loss.backward()
        >>> optimizer.step()
        >>> update_and_allocate(model, step)
        >>> optimizer.zero_grad()
    """
    for name, modules in active_modules(model):
        config = modules[0].config
        total = config.total_step or total_step
        if total is None or config.tinit + config.tfinal >= total:
            raise AdapterError(
                f"update_and_allocate({name!r}, total_step={total}): the schedule has tinit={config.tinit} and "
                f"tfinal={config.tfinal}; total_step must be more than both together. Set AdaLoRAConfig(total_step=)."
            )
        _allocate(modules, global_step, total)


def _allocate(modules: list[AdaLoRA], step: int, total: int) -> None:
    config = modules[0].config
    last = total - config.tfinal
    if step > last:
        for module in modules:
            module.keep(module.kept)
        return
    for module in modules:
        module.observe()
    allowed, due = budget(config, step, total, len(modules))
    scores = [module.importance() for module in modules]
    count = sum(map(len, scores))
    if due and allowed < count:
        threshold = torch.cat(scores).kthvalue(count - allowed).values
        for module, own in zip(modules, scores, strict=True):
            chosen = own > threshold
            module.keep(chosen)
            if step == last:
                module.kept.copy_(chosen)


def active_modules(model: ModelAdaptersMixin) -> Iterable[tuple[str, list[AdaLoRA]]]:
    """The AdaLoRA adapters of the active setup with their modules that are trained."""
    for name in sorted(model.active_adapters.flatten()) if model.active_adapters else ():
        held = [module for _, module in model.adapter_sites.holding(name)]
        found = [module for module in held if isinstance(module, AdaLoRA) and module.lora_E.requires_grad]
        if found:
            yield name, found


def orthogonality_loss(model: ModelAdaptersMixin) -> Tensor | None:
    """orth_reg_weight times the mean of ||Q Qᵀ - I|| and ||Pᵀ P - I|| over all matrices; eq. 4. None without AdaLoRA.

    To be added to the loss in training. ``AdapterTrainer`` does it.
    """
    losses = [
        modules[0].config.orth_reg_weight * torch.stack([module.orthogonality() for module in modules]).mean() / 2
        for _, modules in active_modules(model)
    ]
    return torch.stack(losses).sum() if losses else None
