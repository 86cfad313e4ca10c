"""`Trainer` for models of which adapters, fusions and heads are trained: only these are saved and resumed."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import TrainOutput

from ..errors import AdapterError, CheckpointError, listing
from ..heads.base import PredictionHead
from ..heads.dispatch import HeadPlan
from ..heads.model_mixin import ModelWithFlexibleHeadsAdaptersMixin
from ..methods.adalora import orthogonality_loss, update_and_allocate
from ..model import ModelAdaptersMixin
from .checkpoint import fused, load_trained, save_trained
from .legacy_arguments import AdapterTrainingArguments
from .loraplus import loraplus_groups
from .processes import SharedTrainer
from .resume import last_complete_checkpoint

logger = logging.getLogger(__name__)

QUANTIZED_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
FUSION_VALUE = re.compile(r"(?:^|\.)adapter_fusion_layer\.[^.]+\.value\.")


class AdapterTrainer(SharedTrainer):
    """`Trainer` that trains, saves and resumes adapters, fusions and heads of a frozen model.

    Takes the arguments of `Trainer`, `tokenizer` as the former name of `processing_class`, and `adapter_names`, a
    setup to activate. A checkpoint has a folder for each adapter, for each fusion while one is trained, and for each
    head; never the base model's weights. Full fine-tuning is the plain `Trainer`'s.

    While a fusion is trained, its regularisation 0.01 * sum ||I - V||^2 (Pfeiffer et al. 2021, arXiv:2005.00247) is
    part of each training loss, and weight decay, which would pull V to 0, leaves V alone.

    Raises:
        AdapterError: The model was never initialised for adapters or none is active; when training begins, that the
            base model is not frozen.

    Example:
        >>> model.add_adapter("sst2")
        >>> model.train_adapter("sst2")
        >>> trainer = AdapterTrainer(model, TrainingArguments(learning_rate=1e-4), train_dataset=dataset)
        >>> trainer.train()
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        adapter_names: Any = None,
        **kwargs: Any,
    ) -> None:
        self._adapter_names = adapter_names
        self._posing: list[tuple[Any, str]] | None = []
        optional = {"model_init": model_init, "preprocess_logits_for_metrics": preprocess_logits_for_metrics}
        kwargs |= {name: value for name, value in optional.items() if value is not None}  # TRL's trainers know not all
        try:
            super().__init__(
                model=None if model is None else self._admit(model),
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer if processing_class is None else processing_class,
                compute_metrics=compute_metrics,
                callbacks=[AdapterTrainerCallback(self), *(callbacks or [])],
                optimizers=optimizers,
                **kwargs,
            )
        finally:
            for quantized, mark in self._posing:
                setattr(quantized, mark, True)
            self._posing = None
        self.label_names = self.label_names or self._labels_of_heads()
        if self.label_smoother is not None and any(head.config.get("shift_labels") for head in self._heads()):
            self.label_smoother = ShiftingLabelSmoother(self.label_smoother.epsilon)

    def _admit(self, model: PreTrainedModel | nn.Module) -> PreTrainedModel:
        """Checks that the model can be trained here, and activates `adapter_names`."""
        asked = f"{type(self).__name__}(model={type(model).__name__})"
        if not isinstance(model, ModelAdaptersMixin):
            raise AdapterError(
                f"{asked}: this model knows no adapters; it must be an AdapterModel or initialised. "
                "Call adapters.init(model) first."
            )
        if self._adapter_names is not None:
            model.set_active_adapters(self._adapter_names)
        if model.active_adapters is None:
            raise AdapterError(
                f"{asked}: Expected a model with an active adapter setup, of {listing(model.adapters_config)} none is; "
                "the one to train must be. Call train_adapter(name), or use transformers' Trainer for the full model."
            )
        # Trainer takes a quantized model only if PEFT adapts it, TRL casts what is trained on one to half precision;
        # they look while they are being made, and never again.
        for mark in QUANTIZED_MARKS:
            if self._posing is not None and vars(model).get(mark):
                self._posing.append((model, mark))
                setattr(model, mark, False)
        return model

    def _heads(self) -> list[PredictionHead]:
        """The active heads."""
        if not isinstance(self.model, ModelWithFlexibleHeadsAdaptersMixin):
            return []
        return [self.model.heads[name] for name in HeadPlan.of(self.model.active_head).names]

    def _labels_of_heads(self) -> list[str]:
        """The labels that the active heads ask for: no signature shows them, as an AdapterModel takes any label."""
        return list(dict.fromkeys(label for head in self._heads() for label in head.get_label_names()))

    @property
    def _adapted(self) -> ModelAdaptersMixin:
        return cast(ModelAdaptersMixin, self.model)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Makes a new model with `model_init` and checks it."""
        return self._admit(super().call_model_init(trial))

    @property
    def train_adapter_fusion(self) -> bool:
        """Whether a fusion is trained: the base model is frozen and there is a `Fuse` in the active setup."""
        return self._adapted.model_frozen and fused(self._adapted.active_adapters)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that decay; the value matrices of fusions do not."""
        return [name for name in super().get_decay_parameter_names(model) if not FUSION_VALUE.search(name)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss; in training with the regularisation of the fusions that are trained."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = found if return_outputs else (found, None)
        if model.training:
            fusion = self._adapted.get_fusion_regularization_loss() if self.train_adapter_fusion else None
            for penalty in (fusion, orthogonality_loss(self._adapted)):
                if penalty is not None:
                    loss = loss + penalty / self._steps_per_scaled_loss(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer; with ``loraplus_lr_ratio`` the matrices B of LoRAs learn that much faster (LoRA+)."""
        ratio = self.args.loraplus_lr_ratio if isinstance(self.args, AdapterTrainingArguments) else None
        if ratio is not None and self.optimizer is None:
            trained = cast(nn.Module, self.model) if model is None else model
            decaying = set(self.get_decay_parameter_names(trained))
            arguments = self.args.learning_rate, ratio, self.args.weight_decay, decaying
            own = cast(PreTrainedModel, self.model)
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, own)
            self.optimizer_cls_and_kwargs = kind, {**options, "params": loraplus_groups(trained, *arguments)}
        return super().create_optimizer(model)

    def _steps_per_scaled_loss(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """By how much Trainer would still divide a mean, but will not because it takes the loss for scaled already."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; `resume_from_checkpoint=True` goes on from the last complete checkpoint in `output_dir`.

        Raises:
            CheckpointError: There is none, or it has not the adapters that are active.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"train(resume_from_checkpoint=True): no complete checkpoint is in {self.args.output_dir!r}; there "
                    "must be one. Train without resume_from_checkpoint, or set output_dir to the run to go on with."
                )
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        save_trained(self._adapted, folder, self.train_adapter_fusion, self.args.should_save)
        if not self.args.should_save:
            return
        logger.info("Saved adapters to %s", folder)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        logger.info("Loading adapters from %s", resume_from_checkpoint)
        load_trained(self._adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        checkpoint = str(self.state.best_model_checkpoint)
        logger.info("Loading best adapter(s) from %s (score: %s)", checkpoint, self.state.best_metric)
        load_trained(self._adapted, checkpoint)


class ShiftingLabelSmoother(LabelSmoother):
    """Label smoothing where labels are the next tokens: Trainer knows the models that do so by their class names."""

    def __call__(self, model_output: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss."""
        smoothed: Any = super().__call__
        loss: torch.Tensor = smoothed(model_output, labels, **{**kwargs, "shift_labels": True})
        return loss


class Seq2SeqAdapterTrainer(AdapterTrainer, Seq2SeqTrainer):
    """`AdapterTrainer` that can evaluate and predict with what the model generates."""


class AdapterTrainerCallback(TrainerCallback):
    """Stops a training that would change the base model, shares out AdaLoRA's ranks. An `AdapterTrainer` has it.

    Raises:
        AdapterError: When training begins, that the base model is not frozen.
    """

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the base model is frozen."""
        if not self.trainer._adapted.model_frozen:
            raise AdapterError(
                "train(): The pre-trained model weights are not frozen; they must be to train adapters. "
                "Call train_adapter() or train_adapter_fusion() first, or use transformers' Trainer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shares the ranks of AdaLoRA adapters out anew."""
        update_and_allocate(self.trainer._adapted, state.global_step + 1, state.max_steps)
