"""What every training script does first: it reads its options, sets up the log, and reads the files it is given."""

import logging
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import HfArgumentParser, TrainingArguments

from ..errors import AdapterError

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Reader of a table by the extension of its file."""


def parse_options(*classes: Any) -> tuple[Any, ...]:
    """The options of a script, one object of each dataclass: of the command line, or of the one JSON file it names.

    Raises:
        AdapterError: The JSON file is missing or broken, or has an option that there is not.
    """
    parser = HfArgumentParser(classes)
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".json"):
        return tuple(parser.parse_args_into_dataclasses())
    try:
        return tuple(parser.parse_json_file(sys.argv[1]))
    except (OSError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{sys.argv[1]}: the options cannot be read from it ({error}); it must be one JSON object that has all "
            "required options and no unknown ones. --help has every option."
        ) from error


def set_up_logging(logger: logging.Logger, arguments: TrainingArguments) -> None:
    """A script tells what it does; the libraries below it speak as `log_level` says, else of warnings only."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO if arguments.should_log else logging.ERROR)
    level = arguments.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    logging.getLogger("datasets").setLevel(level)


def read_table(path: str | Path, cache_dir: str | None = None) -> Any:
    """The rows of a csv, tsv, json, jsonl or parquet file, as a `datasets.Dataset`.

    Raises:
        AdapterError: The file is not there, is empty, is not UTF-8 or has another form than its name says.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    extension = Path(path).suffix.lower()
    if extension not in READERS:
        raise AdapterError(f"{path}: its extension is {extension!r}; it must be one of {', '.join(READERS)}.")
    if not Path(path).is_file():
        raise AdapterError(f"{path}: there is no such file; it must exist.")
    if Path(path).stat().st_size == 0:
        raise AdapterError(f"{path}: the file is empty; it must have at least one row.")
    options: dict[str, Any] = {"data_files": str(path), "split": "train", "cache_dir": cache_dir}
    if READERS[extension] == "csv":  # the text "NA" or "null" is text, only an empty cell is missing
        options |= {"sep": "\t" if extension == ".tsv" else ",", "keep_default_na": False, "na_values": [""]}
    try:
        return load_dataset(READERS[extension], **options)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise AdapterError(f"{path}: it cannot be read as {READERS[extension]} ({cause}); it must be valid.") from error
    except ValueError as error:  # what load_dataset says of a file without rows
        raise AdapterError(f"{path}: it has no rows ({error}); it must have at least one.") from error
