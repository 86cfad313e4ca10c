"""Setups that 1.3.0 saved compute here what they computed there; those that this library saves, 1.3.0 has read."""

import json

import pytest
from setups import EVIDENCE, SETUPS, base, deviation, digest, goldens, rewrite


@pytest.fixture(scope="module")
def folder():
    with goldens() as found:
        yield found


@pytest.mark.parametrize("name", SETUPS)
def test_outputs(name, folder):
    model = base(folder)
    setup, heads = model.load_adapter_setup(folder / name, set_active=True)
    assert (setup, heads) == SETUPS[name]
    assert deviation(model, folder, name) < 1e-5


def test_1x_reads_what_this_library_writes(tmp_path):
    """``check`` of setups.py has loaded with 1.3.0 the very files that are written now."""
    rewrite(tmp_path)
    evidence = json.loads(EVIDENCE.read_text())
    assert {name: digest(tmp_path / name) for name in SETUPS} == {name: row["digest"] for name, row in evidence.items()}
    assert all(row["deviation"] < 1e-5 for row in evidence.values())
