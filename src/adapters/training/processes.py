"""What `Trainer` does otherwise where several processes train: one model each (DDP) or a part of it each (FSDP2)."""

import os
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME


class SharedTrainer(Trainer):
    """`Trainer` whose checkpoints have no weights of the base model, and whose steps may leave some adapters out."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what was trained, in the main process; all have to call it, as each may have a part of the tensors."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer  # which Trainer needs to train, but not to be imported

        plugin: Any = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """DDP looks for adapters that a batch does not touch; Trainer lets it only without checkpointing.

        Only checkpointing with reentry hides from it what a pass has used.
        """
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        if self.args.ddp_find_unused_parameters is None:
            options: Any = self.args.activation_checkpointing_kwargs or {}
            arguments["kwargs_handlers"][0].find_unused_parameters = not options.get("use_reentrant", False)
        return arguments
