"""Checkpoints in zip and tar files. Nothing of an archive is written outside its folder, and no more than a limit."""

import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import CheckpointError

LARGEST = 16 << 30
"""Bytes that an archive may hold."""
LARGEST_FACTOR, FACTOR_FROM = 100, 256 << 20
"""How many times its own size an archive of more than so many bytes may hold: weights are hardly compressible."""
MOST_FILES = 10_000
CHUNK = 1 << 20

Entry = tuple[str, int, IO[bytes]]


def unpack(archive: Path, folder: Path, asked: str) -> None:
    """Writes the files of a zip or tar file into a new folder: all or none.

    Raises:
        CheckpointError: It is no archive or a broken one, is too large, or holds more than plain files inside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _unpack(archive, temporary, asked)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{asked}: the archive {archive.name!r} is truncated or broken ({type(error).__name__}: {error}). "
            "Download it again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def content_folder(folder: Path) -> Path:
    """Where the files are: in the folder itself, or in the only folder that it holds."""
    entries = [path for path in folder.iterdir() if path.name != "__MACOSX"]
    return content_folder(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder


def _unpack(archive: Path, folder: Path, asked: str) -> None:
    limit = min(LARGEST, max(FACTOR_FROM, archive.stat().st_size * LARGEST_FACTOR))
    total = count = 0
    with ExitStack() as opened:
        for name, size, stream in _entries(archive, opened, asked):
            total, count = total + size, count + 1
            if total > limit or count > MOST_FILES:
                raise CheckpointError(
                    f"{asked}: the archive {archive.name!r} holds more than {limit:,} bytes or {MOST_FILES:,} files, "
                    "which no checkpoint of its size does. Unpack it yourself if you trust it, and pass the directory."
                )
            target = folder / _inside(name, archive, asked)
            target.parent.mkdir(parents=True, exist_ok=True)
            with stream, target.open("xb") as file:
                _copy(stream, file, size)


def _entries(archive: Path, opened: ExitStack, asked: str) -> Iterator[Entry]:
    """The name, size and content of each file; links and devices are refused."""
    if zipfile.is_zipfile(archive):
        contents = opened.enter_context(zipfile.ZipFile(archive))
        for entry in contents.infolist():
            kind = entry.external_attr >> 28  # of a Unix mode; 0 where the archive is of another system
            if kind not in (0, 0o4, 0o10):
                raise _refused(entry.filename, "a link or a device", archive, asked)
            if not entry.is_dir():
                yield entry.filename, entry.file_size, contents.open(entry)
        return
    if not tarfile.is_tarfile(archive):
        raise CheckpointError(
            f"{asked}: {archive.name!r} is neither a zip nor a tar file; pass one, or the directory of a checkpoint."
        )
    packed = opened.enter_context(tarfile.TarFile.open(archive))
    for member in packed:
        stream = packed.extractfile(member) if member.isreg() else None
        if stream is not None:
            yield member.name, member.size, stream
        elif not member.isdir():
            raise _refused(member.name, "a link or a device", archive, asked)


def _inside(name: str, archive: Path, asked: str) -> PurePosixPath:
    """The path of an entry below the folder, whatever system unpacks it."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or {"\\", ":", "\0"} & {*name}:
        raise _refused(name, "a path that leads out of its folder", archive, asked)
    return path


def _refused(name: str, what: str, archive: Path, asked: str) -> CheckpointError:
    return CheckpointError(
        f"{asked}: the archive {archive.name!r} is refused: {name!r} is {what}; a checkpoint has plain files only."
    )


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0:
        chunk = source.read(min(CHUNK, size))
        if not chunk:
            raise EOFError("a file ends before its size")
        target.write(chunk)
        size -= len(chunk)
    if source.read(1):
        raise EOFError("a file goes on beyond its size")
