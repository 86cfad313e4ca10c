"""`TrainingArguments` that still take the options which transformers v5 dropped."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.debug_utils import DebugOption

from ..errors import AdapterError
from .resume import is_complete, last_complete_checkpoint

logger = logging.getLogger(__name__)


def _ratio_as_steps(ratio: float) -> float:
    """`warmup_ratio` as `warmup_steps` takes it: below 1 it is a share of all steps, and 1 would be one step."""
    if not 0 <= ratio <= 1:
        raise AdapterError(f"warmup_ratio={ratio}: it is no share of the steps; it must lie in [0, 1].")
    return min(ratio, math.nextafter(1.0, 0.0))


def _same(value: Any) -> Any:
    return value


SUCCESSORS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "evaluation_strategy": ("eval_strategy", _same),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", _same),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", _same),
    "no_cuda": ("use_cpu", _same),
    "warmup_ratio": ("warmup_steps", _ratio_as_steps),
    "group_by_length": ("train_sampling_strategy", lambda _: "group_by_length"),
    "adafactor": ("optim", lambda _: "adafactor"),
    "torchdynamo": ("torch_compile_backend", _same),
    "push_to_hub_token": ("hub_token", _same),
}
"""Dropped option -> the option that took its place, and the dropped value in the new terms."""

WITHOUT_EFFECT: dict[str, str] = {
    "save_safetensors": "weights are always written as safetensors",
    "use_mps_device": "an MPS device is used whenever there is one",
    "jit_mode_eval": "evaluation is not traced any more; see --torch_compile",
    "fp16_opt_level": "mixed precision is always torch's own",
    "fp16_backend": "mixed precision is always torch's own",
    "half_precision_backend": "mixed precision is always torch's own",
    "tpu_num_cores": "the launcher decides",
    "past_index": "no model uses it any more",
    "use_legacy_prediction_loop": "there is one evaluation loop",
    "mp_parameters": "only SageMaker's launcher reads it",
    "ray_scope": "pass scope= to hyperparameter_search",
}
"""Dropped option that nothing took the place of -> why."""


@dataclass
class AdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the options of transformers 4 that v5 dropped, each with its old meaning.

    A renamed option is set under its new name, with a note in the log; if both are given, the new name counts. After
    that the old name has its default again, so that `dataclasses.replace` with the new name takes effect.

    Example:
        ```python
        arguments = AdapterTrainingArguments("out", evaluation_strategy="epoch", overwrite_output_dir=True)
        trainer.train(resume_from_checkpoint=arguments.checkpoint_to_resume())
        ```
    """

    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={"help": "LoRA+: the learning rate of LoRA's matrices B over that of the rest, 16 or so."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train from the start even if output_dir has content or checkpoints."}
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Now --eval_strategy."})
    per_gpu_train_batch_size: int | None = field(default=None, metadata={"help": "Now --per_device_train_batch_size."})
    per_gpu_eval_batch_size: int | None = field(default=None, metadata={"help": "Now --per_device_eval_batch_size."})
    no_cuda: bool = field(default=False, metadata={"help": "Now --use_cpu."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Now --warmup_steps with a value below 1."})
    group_by_length: bool = field(default=False, metadata={"help": "Now --train_sampling_strategy group_by_length."})
    adafactor: bool = field(default=False, metadata={"help": "Now --optim adafactor."})
    torchdynamo: str | None = field(default=None, metadata={"help": "Now --torch_compile_backend."})
    include_tokens_per_second: bool = field(default=False, metadata={"help": "Now --include_num_input_tokens_seen."})
    include_inputs_for_metrics: bool = field(default=False, metadata={"help": "Now --include_for_metrics inputs."})
    tpu_metrics_debug: bool = field(default=False, metadata={"help": "Now --debug tpu_metrics_debug."})
    logging_dir: str | None = field(default=None, metadata={"help": "Now the variable TENSORBOARD_LOGGING_DIR."})
    push_to_hub_token: str | None = field(default=None, metadata={"help": "Now --hub_token."})
    push_to_hub_model_id: str | None = field(default=None, metadata={"help": "Now --hub_model_id."})
    push_to_hub_organization: str | None = field(default=None, metadata={"help": "Now a part of --hub_model_id."})
    fsdp_min_num_params: int = field(default=0, metadata={"help": "Now an entry of --fsdp_config."})
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": "Now an entry of --fsdp_config."}
    )
    save_safetensors: bool = field(default=True, metadata={"help": "Without effect."})
    use_mps_device: bool = field(default=False, metadata={"help": "Without effect."})
    jit_mode_eval: bool = field(default=False, metadata={"help": "Without effect."})
    fp16_opt_level: str = field(default="O1", metadata={"help": "Without effect."})
    fp16_backend: str = field(default="auto", metadata={"help": "Without effect."})
    half_precision_backend: str = field(default="auto", metadata={"help": "Without effect."})
    tpu_num_cores: int | None = field(default=None, metadata={"help": "Without effect."})
    past_index: int = field(default=-1, metadata={"help": "Without effect."})
    use_legacy_prediction_loop: bool = field(default=False, metadata={"help": "Without effect."})
    mp_parameters: str = field(default="", metadata={"help": "Without effect."})
    ray_scope: str | None = field(default="last", metadata={"help": "Without effect."})

    def __post_init__(self) -> None:
        self._set_successors()
        self._set_entries()
        super().__post_init__()  # type: ignore[no-untyped-call]

    def checkpoint_to_resume(self) -> str | None:
        """The checkpoint that training goes on from: the one asked for, else the last complete one in `output_dir`.

        None means a start from scratch; with `overwrite_output_dir` that is the rule.

        Raises:
            AdapterError: `output_dir` has content but no checkpoint and may not be overwritten, or the checkpoint
                asked for is none.
        """
        if not self.do_train:
            return None
        if self.resume_from_checkpoint is not None:
            if not is_complete(self.resume_from_checkpoint):
                raise AdapterError(
                    f"resume_from_checkpoint={self.resume_from_checkpoint!r}: there is no complete checkpoint; it "
                    "must be a folder checkpoint-N that a trainer wrote. Give such a folder, or leave it out."
                )
            return str(self.resume_from_checkpoint)
        output = Path(str(self.output_dir))
        if self.overwrite_output_dir or not output.is_dir():
            return None
        checkpoint = last_complete_checkpoint(output)
        if checkpoint is None and any(output.iterdir()):
            raise AdapterError(
                f"output_dir={str(output)!r}: the folder is not empty and has no checkpoint to resume from; it must be "
                "empty or new. Pass --overwrite_output_dir to train from the start, or name another folder."
            )
        if checkpoint is not None:
            logger.warning("Resuming from %s; pass --overwrite_output_dir to train from the start.", checkpoint)
        return checkpoint

    def _set_successors(self) -> None:
        defaults = {option.name: option.default for option in fields(self)}
        for old, (new, convert) in SUCCESSORS.items():
            given = getattr(self, old)
            if given == defaults[old]:
                continue
            setattr(self, old, defaults[old])
            if getattr(self, new) == defaults[new]:
                setattr(self, new, convert(given))
            logger.warning("--%s is now --%s: it is %r.", old, new, getattr(self, new))
        for old, reason in WITHOUT_EFFECT.items():
            if getattr(self, old) != defaults[old]:
                logger.warning("--%s has no effect: %s.", old, reason)

    def _set_entries(self) -> None:
        """The dropped options that are now an entry of another one."""
        if self.include_inputs_for_metrics and "inputs" not in self.include_for_metrics:
            self.include_for_metrics = [*self.include_for_metrics, "inputs"]
        if self.include_tokens_per_second and self.include_num_input_tokens_seen in ("no", False):
            self.include_num_input_tokens_seen = "all"
        if self.tpu_metrics_debug:
            options = self.debug.split() if isinstance(self.debug, str) else self.debug or []
            self.debug = list(dict.fromkeys([*map(DebugOption, options), DebugOption.TPU_METRICS_DEBUG]))
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.expanduser(self.logging_dir)
        if (self.push_to_hub_model_id or self.push_to_hub_organization) and self.hub_model_id is None:
            repository = self.push_to_hub_model_id or Path(str(self.output_dir)).name
            self.hub_model_id = "/".join(filter(None, (self.push_to_hub_organization, repository)))
        self._set_fsdp_entries()

    def _set_fsdp_entries(self) -> None:
        entries: dict[str, Any] = {}
        if self.fsdp_min_num_params:
            entries["min_num_params"] = self.fsdp_min_num_params
        if self.fsdp_transformer_layer_cls_to_wrap is not None:
            entries["transformer_layer_cls_to_wrap"] = [self.fsdp_transformer_layer_cls_to_wrap]
        if not entries:
            return
        if isinstance(self.fsdp_config, str):
            raise AdapterError(
                f"fsdp_config={self.fsdp_config!r}: {' and '.join(entries)} came as options of their own; they must "
                "stand in that configuration. Move them there."
            )
        self.fsdp_config = {**(self.fsdp_config or {}), **entries}


@dataclass
class Seq2SeqAdapterTrainingArguments(AdapterTrainingArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the options of transformers 4 that v5 dropped."""
