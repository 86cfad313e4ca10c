"""Finding the folder of a checkpoint: by path, by URL, or by its name on the Hugging Face Hub, which is asked here."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, listing, suggestion
from . import archives, urls

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

DOWNLOAD_ARGUMENTS = (
    "cache_dir", "checksum", "checksum_algo", "force_download", "local_files_only", "revision", "token",
)  # fmt: skip
FORMER_ARGUMENTS = ("force_extract", "proxies", "resume_download", "source", "use_auth_token", "user_agent")
"""Arguments of 1.x that have no meaning any more: accepted with a warning."""

FILES = ["*.json", "*.bin", "*.safetensors"]
TAG = "adapters"
"""What the Hub tags repositories with whose cards name this library."""
CONFIG_KEYS = ("adapters", "adapter_transformers")
"""Where the Hub keeps the name of the base model of an adapter."""
HASHES = {64: ("sha256", ""), 40: ("sha1", "blob {}\0")}
"""How a cached file's name is made from its content, by its length: of a large file, and of one in git."""


def resolve(asked: str, name: str, version: str | None = None, **arguments: Any) -> Path:
    """The folder that `name` stands for: a local one or an archive's, the archive at a URL, or a Hub repository's.

    Args:
        asked: The call, for messages.
        version: The revision on the Hub.
        arguments: `cache_dir`, `force_download`, `local_files_only`, `revision` and `token` of
            `huggingface_hub.snapshot_download`; for a URL, also `checksum` and `checksum_algo` (sha1 by default).

    Raises:
        CheckpointError: Nothing of that name can be found, or what is found is broken or refused.
        ConfigError: An argument is unknown.
    """
    settings = _settings(asked, arguments)
    if version is not None:
        settings["revision"] = version
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        return _of_local_archive(asked, path, settings)
    if name.partition("://")[0].lower() in urls.SCHEMES:
        return urls.folder_of(asked, name, settings)
    if "://" in name:
        raise CheckpointError(f"{asked}: only http and https URLs can be loaded; download it and pass the directory.")
    for argument in ("checksum", "checksum_algo"):
        if settings.pop(argument, None) is not None:
            raise ConfigError(f"{asked}: {argument!r} is for URLs; the Hub has revisions: pass version=<commit>.")
    return _download(asked, name, settings)


def _of_local_archive(asked: str, path: Path, settings: dict[str, Any]) -> Path:
    state = path.stat()
    version = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = urls.cache_folder(settings) / f"file-{hashlib.sha256(version.encode()).hexdigest()[:32]}"
    if not folder.is_dir():
        archives.unpack(path, folder, asked)
    return archives.content_folder(folder)


def _settings(asked: str, arguments: dict[str, Any]) -> dict[str, Any]:
    for argument in arguments:
        if argument in FORMER_ARGUMENTS:
            warnings.warn(
                f"{asked}: the argument {argument!r} has no effect any more; leave it out.", FutureWarning, stacklevel=5
            )
        elif argument not in DOWNLOAD_ARGUMENTS:
            raise ConfigError(f"{asked}: unknown argument {argument!r}; {suggestion(argument, DOWNLOAD_ARGUMENTS)}")
    return {key: value for key, value in arguments.items() if key in DOWNLOAD_ARGUMENTS and value is not None}


def _download(asked: str, name: str, settings: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most loads are of local folders

    try:
        folder = Path(snapshot_download(name, library_name="adapters", allow_patterns=FILES, **settings))
    except Exception as error:  # what a network can raise is without limit
        raise CheckpointError(
            f"{asked}: there is no directory {name!r} here, {_meaning(error, name)}. "
            "Pass a folder that was saved or 'user/repository'."
        ) from error
    _check_hashes(asked, folder)
    return folder


def _meaning(error: Exception, name: str) -> str:
    """Why a download failed. Errors of the Hub are subclasses of each other, so their order matters."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        archive = "; the archive of task/adapter@organisation is gone: its adapters are on the Hub, as AdapterHub/..."
        return f"and it cannot be the name of a Hub repository{archive if '@' in name else ''}"
    if isinstance(error, errors.GatedRepoError):
        return "and its repository on the Hub is gated: accept its conditions there and pass token=..."
    if isinstance(error, errors.RevisionNotFoundError):
        return "and its repository on the Hub has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "and the Hub has no such repository, or only for those who pass another token=... (404 or 401)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "and the Hub cannot be reached, nor is it in the local cache"
    reason = (str(error).splitlines() or [""])[0]
    return f"and its download from the Hub failed ({type(error).__name__}: {reason})"


def _check_hashes(asked: str, folder: Path) -> None:
    """Compares cached files with the hashes that the Hub states, by which they are named; wrong ones are removed.

    Raises:
        CheckpointError: A file is not what the Hub has.
    """
    cached = {link: link.resolve() for link in folder.rglob("*") if link.is_symlink()}
    wrong = {link: blob for link, blob in cached.items() if blob.parent.name == "blobs" and not _is_whole(blob)}
    for link, blob in wrong.items():
        link.unlink()
        blob.unlink(missing_ok=True)
    if wrong:
        raise CheckpointError(
            f"{asked}: {listing(sorted(link.name for link in wrong))}: the content is not what the Hub has; its hash "
            "must be the one that the Hub states. It was removed from the cache; load again."
        )


def _is_whole(blob: Path) -> bool:
    if len(blob.name) not in HASHES:
        return True
    algorithm, start = HASHES[len(blob.name)]
    digest = hashlib.new(algorithm, start.format(blob.stat().st_size).encode(), usedforsecurity=False)
    with blob.open("rb") as file:
        while chunk := file.read(urls.CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == blob.name


@dataclass(frozen=True)
class AdapterInfo:
    """What the Hub knows of an adapter; the fields are those of 1.x.

    Attributes:
        source: Always ``"hf"``.
        adapter_id: The repository.
        model_name: The model it was trained for, if its config says so.
        username: Who owns the repository.
        sha1_checksum: The commit.
    """

    source: str
    adapter_id: str
    model_name: str | None = None
    task: str | None = None
    subtask: str | None = None
    username: str | None = None
    adapter_config: dict[str, Any] | None = None
    sha1_checksum: str | None = None


def list_adapters(model_name: str | None = None) -> list[AdapterInfo]:
    """The adapters on the Hub, or those of one model.

    Raises:
        CheckpointError: The Hub cannot be asked.

    Example:
        >>> [found.adapter_id for found in adapters.list_adapters("bert-base-uncased")]
    """
    from huggingface_hub import HfApi

    try:
        found = [_info(model) for model in HfApi().list_models(filter=TAG, full=True, fetch_config=True)]
    except Exception as error:
        raise CheckpointError(f"list_adapters({model_name!r}): the Hub cannot be asked: {error}") from error
    return [info for info in found if model_name in (None, info.model_name)]


def get_adapter_info(adapter_id: str) -> AdapterInfo | None:
    """What the Hub knows of an adapter; None if it has none of that name, or only for others.

    Raises:
        CheckpointError: The Hub cannot be asked.

    Example:
        >>> adapters.get_adapter_info("AdapterHub/bert-base-uncased-pf-imdb").model_name
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return _info(HfApi().model_info(adapter_id))
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:
        raise CheckpointError(f"get_adapter_info({adapter_id!r}): the Hub cannot be asked: {error}") from error


def _info(model: "ModelInfo") -> AdapterInfo:
    config: dict[str, Any] = model.config or {}
    names = [found.get("model_name") for key in CONFIG_KEYS if isinstance(found := config.get(key), dict)]
    base = next(filter(None, names), None)
    return AdapterInfo("hf", model.id, base, username=model.id.partition("/")[0], sha1_checksum=model.sha)
