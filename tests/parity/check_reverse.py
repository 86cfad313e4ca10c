"""Reads with adapters 1.3.0 what ``write_reverse.py`` wrote with this library, and notes how far the outputs deviate.

RUN THIS IN THE REFERENCE ENVIRONMENT ONLY (adapters 1.3.0, transformers 4.57.6).

    python tests/parity/check_reverse.py FOLDER

Writes ``goldens/reverse.json``: per group the largest deviation from the golden outputs (1.3.0's own, from its own
files) and a digest of the files, by which a test knows that the library still writes the same. What 1.3.0 calls missing
or unexpected is printed; keys that are only aliases of tensors that are there do not count.
"""

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from golden import CASES, GOLDENS, GROUPS, archive, arguments, expected
from golden_runs import deviation, load, new_model, outputs

ALIASES = (".prefix_tuning.pool.", ".adapter_norm_before.")


def check(architecture: str, group: str, folder: Path) -> dict[str, Any]:
    """1.3.0's view of one group that this library saved."""
    model = new_model(archive(architecture), GROUPS[group])
    report = load(model, GROUPS[group], folder)
    missing = [key for key in report["missing_keys"] if not any(alias in f".{key}" for alias in ALIASES)]
    furthest = 0.0
    for case in (case for case in CASES if (case.architecture, case.group) == (architecture, group)):
        for name in case.inputs:
            found = outputs(model, GROUPS[group], case.setup, arguments(architecture, GROUPS[group], name))
            wanted = expected(architecture)[f"{case.name}/{name}"]
            furthest = max([furthest, *(deviation(found[kind], tensor) for kind, tensor in wanted.items())])
    return {"deviation": float(f"{furthest:.1e}"), "missing": missing, "unexpected": report["unexpected_keys"]}


def main(root: Path) -> None:
    if version("adapters") != "1.3.0":
        sys.exit(f"check_reverse.py: adapters {version('adapters')} is installed; it must be 1.3.0.")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    evidence = {}
    for key, digest in json.loads((root / "digests.json").read_text()).items():
        architecture, _, group = key.partition("/")
        found = check(architecture, group, root / architecture)
        if found["deviation"] > 1e-5 or found["missing"] or found["unexpected"]:
            print(key, found)
        evidence[key] = {"deviation": found["deviation"], "digest": digest}
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in evidence.items())
    (GOLDENS / "reverse.json").write_text(f"{{\n {lines}\n}}\n")
    print(f"{len(evidence)} groups, at most {max(row['deviation'] for row in evidence.values()):.1e} apart")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
