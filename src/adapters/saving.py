"""Writing a whole model as ``save_pretrained`` of transformers does: all of its files or none."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from secrets import token_hex
from typing import Any

from .checkpoints import atomic, files

OF_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""Files with the weights of a whole model."""


def save_model(directory: str | os.PathLike[str], save: Callable[..., None], **options: Any) -> None:
    """Has ``save_pretrained`` of transformers write a whole model into a directory: all files or none.

    Args:
        save: Takes the folder, and `options`.

    Raises:
        CheckpointError: The directory cannot be written to.
    """
    root = files.root_of(directory)
    if options.get("distributed_checkpoint"):  # several processes write into one folder
        save(directory, **options)
        return
    if options.get("push_to_hub"):
        options.setdefault("repo_id", root.name)
    atomic.finish_around(root)
    is_new, stage = not root.exists(), atomic.beside(root / "model", token_hex(4))
    with files.or_told(root):
        try:
            stage.mkdir(parents=True)
            save(stage, **options)
            places = [file.relative_to(stage).as_posix() for file in sorted(stage.rglob("*")) if file.is_file()]
            stale = {file.name for file in root.iterdir() if OF_MODEL.fullmatch(file.name)}
            jobs = [(place, partial(os.replace, stage / place)) for place in places]
            atomic.write_all(root, jobs, stale if any(map(OF_MODEL.fullmatch, places)) else ())
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            atomic.remove_abandoned(root / "model")
            if is_new:
                with suppress(OSError):  # it is not empty, as it should be
                    root.rmdir()
