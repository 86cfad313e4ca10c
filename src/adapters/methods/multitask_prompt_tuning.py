"""Multitask prompt tuning: a prompt that all tasks share, times a low-rank matrix of each task."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.base import AdapterConfig
from ..configuration.checks import check_integer
from ..configuration.registry import register_architecture, register_config
from ..context import current
from ..errors import AdapterError
from ..layouts import PromptSignal
from ..method import register
from ..prompts import PromptSite
from .prompt_tuning import Prompt, check_place, check_start, starting_prompt


@dataclass(eq=False)
class MultitaskPromptTuningConfig(AdapterConfig):
    """A prompt for ``num_tasks`` tasks. Wang et al. 2023, arXiv:2303.02861.

    Each task has a matrix of rank ``num_ranks``, by which the shared prompt is multiplied element by element. The
    forward call says with ``task_ids`` (b,) which task each row is of; with one task it need not. The other fields are
    as in ``PromptTuningConfig``.

    Raises:
        ConfigError: a field is unknown or its value is not allowed.
    """

    architecture: str | None = "multitask_prompt_tuning"
    prompt_length: int = 10
    num_tasks: int = 1
    num_ranks: int = 1
    prompt_init: str = "random_uniform"
    prompt_init_text: str | list[int] | None = None
    combine: str = "prefix"
    placement: str = "tokens"
    random_uniform_scale: float = 0.5
    tokenizer_name_or_path: str | None = None
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("prompt_length", "num_tasks", "num_ranks"):
            check_integer(self, field, least=1)
        check_place(self)
        check_start(self)


register_architecture("multitask_prompt_tuning", MultitaskPromptTuningConfig)
register_config("multitask_prompt_tuning", MultitaskPromptTuningConfig())


@register(MultitaskPromptTuningConfig, PromptSite)
class MultitaskPromptTuning(Prompt):
    """[P * (U_k V_k); E]

    A shared prompt P (p, d) times U_k V_k, with U_k (p, r) and V_k (r, d) of the row's task k, element by element. Wang
    et al. 2023, arXiv:2303.02861, section 3.1.

    Site: PromptSite. Parameters: p d + n r (p + d) for n tasks of rank r.
    Start: P as in prompt tuning, U and V normal with 0.02, not the identity. Merges: no.
    """

    def __init__(self, config: MultitaskPromptTuningConfig, site: PromptSite, shared: Any = None) -> None:
        super().__init__(config, site, config.prompt_length)
        self.tasks = config.num_tasks
        self.embedding = starting_prompt(config, site)
        self.prefix_task_cols = nn.Parameter(torch.empty(config.num_tasks, config.prompt_length, config.num_ranks))
        self.prefix_task_rows = nn.Parameter(torch.empty(config.num_tasks, config.num_ranks, site.width))
        for factor in (self.prefix_task_cols, self.prefix_task_rows):
            nn.init.normal_(factor, std=0.02)

    def prompt(self, signal: PromptSignal) -> Tensor:
        """(1, p, d) or (b, p, d) the prompt of each row."""
        columns: Tensor = self.prefix_task_cols
        rows: Tensor = self.prefix_task_rows
        if self.tasks > 1:
            tasks = self._task_ids(signal).to(columns.device)
            columns, rows = columns[tasks], rows[tasks]
        return self.embedding.weight * (columns @ rows)

    def _task_ids(self, signal: PromptSignal) -> Tensor:
        """(b,) the task of each row of the signal."""
        forward = current()
        tasks = None if forward is None or forward.task_ids is None else signal.own(forward.task_ids, expanded=True)
        if tasks is None or len(tasks) != len(signal) or not 0 <= int(tasks.min()) <= int(tasks.max()) < self.tasks:
            given = None if tasks is None else tasks.tolist()
            raise AdapterError(
                f"forward with multitask prompt tuning: task_ids={given} for {len(signal)} rows; pass task_ids=, one "
                f"number from 0 to {self.tasks - 1} for each row."
            )
        return tasks
