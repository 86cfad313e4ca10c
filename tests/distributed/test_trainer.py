"""`AdapterTrainer` on two processes, by DDP and by FSDP2: losses, files, checkpoints and what they resume to."""

import functools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from processes import together
from transformers import BertConfig, TrainingArguments, set_seed

from adapters import AdapterTrainer, AutoAdapterModel, DynamicAdapterFusionConfig
from adapters.composition import Fuse, MultiTask, Stack
from adapters.sharded import is_sharded

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
CONFIG = BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
TOKENS = torch.randint(5, 50, (16, 6), generator=torch.manual_seed(1)).tolist()
ROWS = [{"input_ids": row, "attention_mask": [1] * 6, "labels": number % 2} for number, row in enumerate(TOKENS)]
STEPS = 4
BLOCKS = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}}


def model(setup: Any = "task", trained: Any = None, **adapters: str) -> Any:
    set_seed(0)
    made = AutoAdapterModel.from_config(BertConfig.from_dict(CONFIG.to_dict()))
    for name, config in adapters.items():
        made.add_adapter(name, config)
    made.add_classification_head("task", num_labels=2)
    if isinstance(setup, Fuse):
        made.add_adapter_fusion(setup, DynamicAdapterFusionConfig(dropout_prob=0.0))
        made.train_adapter_fusion(setup)
    else:
        made.train_adapter(trained or setup)
    made.active_adapters, made.active_head = setup, "task"
    return made


def embeddings() -> Any:
    made = model(task="lora")
    made.train_adapter("task", train_embeddings=True)
    return made


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bottleneck": (functools.partial(model, task="double_seq_bn"), {}),
    "accumulation": (functools.partial(model, task="lora"), {"gradient_accumulation_steps": 2}),
    "bf16": (functools.partial(model, task="unipelt"), {"bf16": True}),
    "checkpointing": (functools.partial(model, task="mam"), {"activation_checkpointing": True}),
    "fusion": (functools.partial(model, Fuse("a", "b"), a="seq_bn", b="seq_bn"), {"weight_decay": 0.1}),
    "adalora": (functools.partial(model, task="adalora[tfinal=1]"), {}),
    "embeddings": (embeddings, {}),
    # adapters that no row, or the rows of one process only, go through; with checkpointing Trainer does not look
    "untouched": (functools.partial(model, "a", Stack("a", "b"), a="lora", b="seq_bn"), {}),
    "untouched, checkpointing": (
        functools.partial(model, "a", Stack("a", "b"), a="lora", b="seq_bn"),
        {"activation_checkpointing": True},
    ),
    "another in each process": (functools.partial(model, MultiTask("a", "b"), a="lora", b="seq_bn"), {}),
}

FSDP_CASES = ("bottleneck", "fusion", "adalora")


def as_on_gpus() -> None:
    """Accelerate has FSDP for accelerators only; what it does for them runs on CPUs as well."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def arguments(folder: Path, processes: int, **options: Any) -> TrainingArguments:
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4 // processes, "learning_rate": 1e-2}
    defaults |= {"save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **{**defaults, **options})


def rows_of(case: str) -> list[dict[str, Any]]:
    """Rows in whose batches, in order, each process has those of one task, where tasks are asked for."""
    tasks = case == "another in each process"
    return [row | {"task_ids": number // 2 % 2} for number, row in enumerate(ROWS)] if tasks else ROWS


def trained(case: str, folder: Path, processes: int, sharded: dict[str, Any]) -> tuple[Any, list[float]]:
    """The trainer after its training, and the losses of its steps."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    make, options = CASES[case]
    options = {**options, **sharded, "train_sampling_strategy": "sequential", "remove_unused_columns": False}
    given = arguments(folder, processes, **options)
    if sharded:
        as_on_gpus()
    trainer = AdapterTrainer(make(), given, train_dataset=rows_of(case))
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_all(rank: int, folder: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    """The losses of each case, or how it failed; what it learned is saved."""
    found: dict[str, Any] = {}
    for case in FSDP_CASES if sharded else CASES:
        try:
            trainer, found[case] = trained(case, folder / case, 2, sharded)
            assert any(map(is_sharded, trainer.model.parameters())) == bool(sharded)
            trainer.save_model()
        except Exception:
            found[case] = traceback.format_exc()
    return found


@functools.cache
def alone(case: str, folder: Path) -> tuple[Any, list[float]]:
    """The model after the training in one process, which is saved below `folder`, and the losses."""
    trainer, losses = trained(case, folder / case, 1, {})
    trainer.save_model(str(folder / case / "saved"))
    return trainer.model, losses


@functools.cache
def on_two(name: str, folder: Path) -> dict[str, Any]:
    return together(train_all, folder / name, BLOCKS if name == "fsdp" else {}, seconds=150)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(autouse=True)
def unshared():
    """As if nothing had been trained before in this process."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("case", "how"), [*((case, "ddp") for case in CASES), *((case, "fsdp") for case in FSDP_CASES)]
)
def test_two_processes_learn_what_one_does(case: str, how: str, place: Path, tmp_path: Path) -> None:
    model, expected = alone(case, place / "alone")
    losses = on_two(how, place)[case]
    assert isinstance(losses, list), losses
    near = {"rtol": 2e-2, "atol": 2e-2} if case == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(losses, expected, **near)
    folders = place / "alone" / case / "saved", place / how / case
    own, theirs = (sorted(file for file in folder.rglob("*") if file.is_file()) for folder in folders)
    assert [file.name for file in own] == [file.name for file in theirs]
    fresh = CASES[case][0]()
    AdapterTrainer(fresh, arguments(tmp_path, 1))._load_from_checkpoint(str(place / how / case))
    for (name, value), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(other, value, **near, msg=lambda text, name=name: f"{name}: {text}")
