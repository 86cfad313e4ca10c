"""Which checkpoint a training run goes on from."""

import json
import logging
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` in `folder` that was written to its end, or None.

    A trainer writes `trainer_state.json` last, so a run that was killed while it saved leaves a checkpoint without it
    or with half of it: that one is passed over.
    """
    if not Path(folder).is_dir():
        return None
    checkpoints = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) is not None]
    for checkpoint in sorted(checkpoints, key=lambda path: _step(path) or 0, reverse=True):
        if is_complete(checkpoint):
            return str(checkpoint)
        logger.warning("%s is incomplete: an earlier checkpoint is looked for.", checkpoint)
    return None


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a trainer finished writing `checkpoint`."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if checkpoint.is_dir() and number.isdigit() else None
