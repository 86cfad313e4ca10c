"""Writes ``goldens/gates.json``: the gating scores that adapters 1.3.0 reports for the gated groups of the goldens.

RUN THIS IN THE REFERENCE ENVIRONMENT ONLY (adapters 1.3.0, transformers 4.57.6), after ``make_goldens.py``.

    python tests/parity/make_gates.py
"""

import json
import logging
import sys
from importlib.metadata import version

import torch
import transformers
from golden import CASES, GOLDENS, GROUPS, archive, arguments
from golden_runs import load, new_model, run


def main() -> None:
    if version("adapters") != "1.3.0":
        sys.exit(f"make_gates.py: adapters {version('adapters')} is installed; it must be 1.3.0.")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    lines = []
    for case in CASES:
        group = GROUPS[case.group]
        if not case.inputs or "use_gating" not in str(group.adapters):
            continue
        model = new_model(archive(case.architecture), group)
        load(model, group, archive(case.architecture))
        for name in case.inputs:
            given = arguments(case.architecture, group, name)
            scores = run(model, case.setup, given, output_adapter_gating_scores=True).adapter_gating_scores
            rounded = {
                adapter: {
                    layer: {place: values.round(6).astype(float).round(6).tolist() for place, values in places.items()}
                    for layer, places in layers.items()
                }
                for adapter, layers in scores.items()
            }
            lines.append(f"{json.dumps(f'{case.id}/{name}')}: {json.dumps(rounded, separators=(',', ':'))}")
    (GOLDENS / "gates.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines)} cases")


if __name__ == "__main__":
    main()
