"""The command ``adapters``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from .describing import describe
from .interface import INTERFACE_FILE


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments`, by default those of the process.

    Example:
        >>> main(["describe", "bert-base-uncased", "--save", "sites.svg"])
    """
    parser = argparse.ArgumentParser("adapters")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("describe", help="print where adapters can sit in a model, and which methods apply")
    shown.add_argument("model", help="a folder or a name on the Hub; only its config is read, and no weight")
    shown.add_argument("--save", metavar="FILE.svg", help="draw it too")
    shown.add_argument("--method", action="append", help="try this one only, such as lora[r=16]; may be given again")
    shown.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    given = parser.parse_args(arguments)
    try:
        config = AutoConfig.from_pretrained(given.model, trust_remote_code=given.trust_remote_code)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=given.trust_remote_code)
        described = Path(given.model, INTERFACE_FILE)
        found = describe(model, given.method, described if described.is_file() else None)
        print(found)
        if given.save:
            found.save(given.save)
    except (OSError, ValueError) as error:
        parser.error(str(error))
