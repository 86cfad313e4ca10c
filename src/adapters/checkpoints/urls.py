"""Archives of checkpoints that are downloaded from a URL, once per version of them."""

import hashlib
import http.client
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import archives

CHUNK = 1 << 20
SCHEMES = ("http", "https")


def folder_of(asked: str, url: str, settings: Mapping[str, Any]) -> Path:
    """The folder that an archive at a URL holds, from the cache if the server has no other version of it.

    Args:
        asked: The call, for messages.
        settings: `cache_dir`, `checksum`, `checksum_algo`, `force_download`, `local_files_only`, `token`.

    Raises:
        CheckpointError: It cannot be had, is not what was asked for, or is refused; see ``archives.unpack``.
    """
    cache = cache_folder(settings)
    key = hashlib.sha256(url.encode()).hexdigest()[:32]
    known = sorted(cache.glob(f"{key}-*"), key=lambda path: path.stat().st_mtime)
    if settings.get("local_files_only") or _is_offline():
        if not known:
            raise CheckpointError(f"{asked}: it is not in {str(cache)!r}, and downloads are off. Allow them once.")
        return archives.content_folder(known[-1])
    try:
        with _open(url, settings.get("token")) as response:
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            folder = cache / f"{key}-{hashlib.sha256((version or '').encode()).hexdigest()[:16]}"
            if folder.is_dir() and version and not settings.get("force_download") and not settings.get("checksum"):
                return archives.content_folder(folder)
            _fetch(asked, response, folder, settings)
    except urllib.error.HTTPError as error:
        raise CheckpointError(f"{asked}: {_meaning(error.code)} (HTTP {error.code} {error.reason}).") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{asked}: the download failed: {error or type(error).__name__}. Try again.") from error
    return archives.content_folder(folder)


def _open(url: str, token: str | None) -> Any:
    """The answer of a server. Only http and https are spoken, also after a redirection, which is not told the token."""
    opener, timeout = urllib.request.OpenerDirector(), _timeout()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "adapters"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return opener.open(request, timeout=timeout)


def _fetch(asked: str, response: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    stated, digest, size = response.headers.get("Content-Length"), None, 0
    if checksum := settings.get("checksum"):
        digest = hashlib.new(settings.get("checksum_algo") or "sha1", usedforsecurity=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder.parent) as place:
        archive = Path(place) / "archive"
        with archive.open("wb") as file:
            while chunk := response.read(CHUNK):
                size += len(chunk)
                if size > archives.LARGEST:
                    raise CheckpointError(
                        f"{asked}: it has more than {archives.LARGEST:,} bytes. Download it yourself."
                    )
                file.write(chunk)
                if digest is not None:
                    digest.update(chunk)
        if stated is not None and int(stated) != size:
            raise CheckpointError(f"{asked}: {size:,} of {int(stated):,} bytes arrived. Try again.")
        if digest is not None and digest.hexdigest() != str(checksum).lower():
            raise CheckpointError(f"{asked}: its {digest.name} is {digest.hexdigest()}, not {checksum}. Do not use it.")
        archives.unpack(archive, folder, asked)
        os.utime(folder, (now := time.time(), now))


def _meaning(status: int) -> str:
    if status in (401, 403):
        return "the server gives no access; pass token=..."
    return "there is no such file" if status == 404 else "the server cannot answer now"


def cache_folder(settings: Mapping[str, Any]) -> Path:
    """Where unpacked archives are kept: in `cache_dir`, or where 1.x and torch keep downloads."""
    if given := settings.get("cache_dir"):
        return Path(given)
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch"
    return Path(os.environ.get("TORCH_HOME") or user).expanduser() / "adapters"


def _is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def _timeout() -> float:
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    return float(HF_HUB_DOWNLOAD_TIMEOUT)
