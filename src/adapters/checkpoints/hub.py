"""Finding the folder of a checkpoint by path or by name."""

import warnings
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, suggestion

DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
FORMER_ARGUMENTS = ("proxies", "resume_download", "source", "use_auth_token", "user_agent")
"""Arguments of 1.x that have no meaning any more: accepted with a warning."""

FILES = ["*.json", "*.bin", "*.safetensors"]


def resolve(asked: str, name: str, version: str | None = None, **arguments: Any) -> Path:
    """The folder that `name` stands for: a local one, else a repository of the Hugging Face Hub, which is downloaded.

    Args:
        asked: The call, for messages.
        version: The revision on the Hub.
        arguments: `cache_dir`, `force_download`, `local_files_only`, `revision` and `token` of
            `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: Neither a folder nor a repository of that name can be found.
        ConfigError: An argument is unknown.
    """
    settings = _settings(asked, arguments)
    if version is not None:
        settings["revision"] = version
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{asked}: {name!r} is a file; pass the directory that holds the checkpoint.")
    if "://" in name:
        raise CheckpointError(f"{asked}: a URL cannot be loaded; download and unpack it, and pass the directory.")
    return _download(asked, name, settings)


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, library_name="adapters", allow_patterns=FILES, **settings))
    except HFValidationError:
        reason = "and it cannot be the name of a Hub repository"
    except LocalEntryNotFoundError:
        reason = "and the Hub cannot be reached, nor is it in the local cache"
    except (HfHubHTTPError, OSError) as error:
        reason = f"and the Hub has no such repository, revision, or no access to it ({type(error).__name__})"
    raise CheckpointError(
        f"{asked}: there is no directory {name!r} here, {reason}. Pass a folder that was saved or 'user/repository'."
    )
