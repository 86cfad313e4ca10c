"""Writing several files so that a crash at any moment leaves all the old ones or all the new ones.

New contents are written beside their targets. One rename, of a journal that lists them, then decides; what it lists is
moved in place after it, by this process or, if that is killed, by whoever reads or writes the folder next.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from ..errors import CheckpointError

JOURNAL = ".adapters-save.journal"
Job = Callable[[Path], object]
"""Writes a file."""

PLACE = re.compile(r"(?:(?!\.{1,2}/)[^/\\\0]+/)?(?!\.)[^/\\\0]+")
"""A file in the folder, or in one of its folders."""
TOKEN = re.compile(r"[0-9a-f]{8}")
ABANDONED_AFTER = 3600.0
"""Seconds after which new contents that were never moved are taken for those of a killed process."""


def write_all(root: Path, jobs: Iterable[tuple[str, Job]], stale: Iterable[str] = ()) -> None:
    """Runs each job on a file beside its target, then moves all of them in place and removes the `stale` files.

    Args:
        root: The folder, which is made if need be.
        jobs: Targets relative to it, at most one folder down; produced one after the other, so that they need not be
            in memory together.
    """
    finish_around(root)
    token, written = token_hex(4), list[str]()
    try:
        for place, job in jobs:
            root.mkdir(parents=True, exist_ok=True)
            new = beside(root / place, token)
            if new.parent != root:
                new.parent.mkdir(exist_ok=True)
                finish(new.parent)
            written.append(place)
            job(new)
            _flush(new)
        journal = beside(root / JOURNAL, token)
        try:
            journal.write_text(json.dumps({"token": token, "new": written, "stale": [*{*stale}.difference(written)]}))
            _flush(journal)
            os.replace(journal, root / JOURNAL)
        finally:
            journal.unlink(missing_ok=True)
        finish(root)
    finally:
        for place in written:
            beside(root / place, token).unlink(missing_ok=True)
    for place in written:
        remove_abandoned(root / place)


def finish_around(folder: Path) -> None:
    """Finishes an interrupted save into a folder or, with several others, into the one that it is in.

    Raises:
        CheckpointError: See ``finish``.
    """
    for root in (folder.parent, folder):
        finish(root)


def finish(root: Path) -> None:
    """Moves in place what an interrupted save into this folder has decided to write; mostly there is nothing to do.

    Raises:
        CheckpointError: The journal is not one of ours, or the folder is read-only.
    """
    journal = root / JOURNAL
    if not os.path.exists(journal):
        return
    try:
        content = json.loads(journal.read_text(encoding="utf-8"))
    except FileNotFoundError:  # finished by another process just now
        return
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(journal)!r}: cannot be read ({error}). Delete it, or save again.") from error
    token, new, stale = _checked(content, journal)
    try:
        for place in new:
            with suppress(FileNotFoundError):  # moved before
                os.replace(beside(root / place, token), root / place)
        for place in stale:
            (root / place).unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{str(root)!r}: a save into it was interrupted and cannot be finished: {error}; its files can be moved in "
            "place only by who may write there. Load it once as that user."
        ) from error


def _checked(content: object, journal: Path) -> tuple[str, list[str], list[str]]:
    found = content if isinstance(content, dict) else {}
    token, new, stale = found.get("token"), found.get("new"), found.get("stale")
    if isinstance(token, str) and TOKEN.fullmatch(token) and isinstance(new, list) and isinstance(stale, list):
        places = [*new, *stale]
        if all(map(_is_place, places)):
            return token, new, stale
    raise CheckpointError(f"{str(journal)!r}: not a journal of an interrupted save. Delete it, or save again.")


def _is_place(place: object) -> bool:
    return isinstance(place, str) and PLACE.fullmatch(place) is not None


def beside(target: Path, token: str) -> Path:
    """Where the new content of a file is written."""
    return target.with_name(f".{target.name}.{token}")


def _flush(file: Path) -> None:
    """Has the disk hold what was written: a full one may say so only now, and a rename may outrun the content."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def remove_abandoned(target: Path) -> None:
    """Removes new contents of a file or folder that were never moved, once they are old."""
    for path in target.parent.glob(f".{target.name}.*"):
        with suppress(OSError):
            if TOKEN.fullmatch(path.name.rpartition(".")[2]) and time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
