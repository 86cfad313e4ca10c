"""Writes the goldens again with this library, for ``check_reverse.py`` to read with 1.3.0.

    python tests/parity/write_reverse.py FOLDER

FOLDER gets, per architecture, ``adapters/<group>/<name>/`` and ``fusions/<group>/<name>/`` as this library saves what
it loaded from the goldens (safetensors), and ``digests.json``.
"""

import json
import sys
from pathlib import Path

from golden import CASES, GROUPS, archive, digest, saved
from golden_runs import load, new_model


def write(architecture: str, group: str, root: Path) -> str | None:
    """Loads a group and saves it below the root; returns the digest of what was written, None for nothing."""
    folders = saved(archive(architecture), GROUPS[group])
    if not folders:
        return None
    model = new_model(archive(architecture), GROUPS[group])
    load(model, GROUPS[group], archive(architecture))
    for kind, name in folders:
        target = root / architecture / kind / group / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (model.save_adapter if kind == "adapters" else model.save_adapter_fusion)(str(target), name)
    return digest(saved(root / architecture, GROUPS[group]))


def main(root: Path) -> None:
    digests = {}
    for architecture, group in dict.fromkeys((case.architecture, case.group) for case in CASES):
        if found := write(architecture, group, root):
            digests[f"{architecture}/{group}"] = found
    (root / "digests.json").write_text(json.dumps(digests, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
