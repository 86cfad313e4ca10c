"""``torchrun … train_and_die.py FOLDER ddp|fsdp``: a training in which a process is killed once, after a checkpoint.

Started again, it goes on from there.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from test_trainer import BLOCKS, CONFIG, ROWS, as_on_gpus, model
from transformers import TrainerCallback, TrainingArguments, set_seed

from adapters import AdapterTrainer
from adapters.sharded import is_sharded
from adapters.training.resume import last_complete_checkpoint

STEPS, KILLED_AT = 5, 3


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AT and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, how: str, dies: bool) -> None:
    """Trains with dropout and AdamW, in two processes, from the last checkpoint on if there is one."""
    CONFIG.hidden_dropout_prob = 0.1
    made = model(task="unipelt")
    set_seed(1)
    done = last_complete_checkpoint(folder)
    options = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        use_cpu=True, disable_tqdm=True, report_to="none", **(BLOCKS if how == "fsdp" else {}),
    )  # fmt: skip
    if how == "fsdp":
        as_on_gpus()
    callbacks: list[TrainerCallback] = [Kill()] if dies and done is None else []
    trainer = AdapterTrainer(made, options, train_dataset=ROWS, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=done)
    assert any(map(is_sharded, trainer.model.parameters())) == (how == "fsdp")
    trainer.save_model()
    if trainer.args.should_save:
        (folder / "started-from.txt").write_text(str(done))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], dies=True)
