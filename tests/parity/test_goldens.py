"""Files that adapters 1.3.0 wrote give the outputs that 1.3.0 computed, and are written again as they were read."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import CASES, GROUPS, Case, Group, archive, arguments, digest, evidence, expected, saved, settings, tensors
from golden_runs import load, new_model, outputs

from adapters import AdapterConfig

T5 = ("t5", "mt5", "t5_unbiased")

# Fields that 1.x computes with and does not save (configs.md, D11 and E2); here they are saved.
NEW_FIELDS = {"subtract_projection", "random_uniform_scale", "placement", "tokenizer_name_or_path", "legacy"}

# Gated LoRAs whose alpha is not r: 1.x ignored alpha, which is said when such a file is read (B9).
RESCALED = "rescaled_"

COMPARED = [case for case in CASES if case.inputs and not case.group.startswith(RESCALED)]
WITH_PREFIX = [case for case in COMPARED if "prefix_tuning" in str(GROUPS[case.group].adapters)]
SAVED = list(dict.fromkeys((case.architecture, case.group) for case in CASES if GROUPS[case.group].adapters))
UNCHANGED = [(architecture, group) for architecture, group in SAVED if not group.startswith(RESCALED)]


@functools.lru_cache(maxsize=1)
def filled(architecture: str, group: str, attention: str) -> Any:
    """The group's model with everything loaded; cases of a group follow each other, so one is kept."""
    model = new_model(archive(architecture), GROUPS[group], attention)
    report = load(model, GROUPS[group], archive(architecture))
    assert report == {"missing_keys": [], "unexpected_keys": []}
    return model


def assert_close(found: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance, msg=lambda text: f"{what}: {text}")


def check(case: Case, attention: str) -> None:
    model = filled(case.architecture, case.group, attention)
    for name in case.inputs:
        found = outputs(model, GROUPS[case.group], case.setup, arguments(case.architecture, GROUPS[case.group], name))
        for kind, wanted in expected(case.architecture)[f"{case.name}/{name}"].items():
            wanted = wanted * unscaled(case) if kind == "hidden" else wanted
            assert_close(found[kind], wanted, f"{kind} on input {name!r}", tolerance=1e-5)


def unscaled(case: Case) -> float:
    """Without a head 1.x's T5AdapterModel returns hidden states times d ** -0.5, as a tied LM head reads them."""
    group = GROUPS[case.group]
    scaled = case.architecture in T5 and group.model == "AutoAdapterModel" and not group.head_type
    return 32**0.5 if scaled else 1.0


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.id)
def test_outputs(case: Case) -> None:
    check(case, "eager")


@pytest.mark.parametrize("case", [case for case in CASES if case.group.startswith(RESCALED)], ids=lambda case: case.id)
def test_outputs_of_gated_loras_that_ignored_alpha(case: Case) -> None:
    with pytest.warns(UserWarning, match="ignored alpha; alpha is set to r = "):
        check(case, "eager")


@pytest.mark.parametrize("case", WITH_PREFIX, ids=lambda case: case.id)
def test_outputs_with_sdpa(case: Case) -> None:
    """1.x is right with eager attention only (D1 to D4); here every implementation gives what eager gave there."""
    check(case, "sdpa")


@pytest.mark.parametrize(("architecture", "group"), UNCHANGED)
def test_files_are_written_as_they_were(architecture: str, group: str, tmp_path: Path) -> None:
    """Load and save is the identity on the files: same keys, same values, same JSON.

    So what ``check_reverse.py`` saw of these files, that 1.3.0 reads them and computes the same, stays true.
    """
    folders = saved(archive(architecture), GROUPS[group])
    if not folders:
        pytest.skip("1.3.0 cannot make this group")
    model = filled(architecture, group, "eager")
    for kind, name in folders:
        target = tmp_path / kind / group / name
        target.parent.mkdir(parents=True, exist_ok=True)
        save = model.save_adapter if kind == "adapters" else model.save_adapter_fusion
        save(str(target), name)
        compare(folders[kind, name], target)
    assert digest(saved(tmp_path, GROUPS[group])) == evidence()[f"{architecture}/{group}"]["digest"]


def known_fields(read: Any) -> Any:
    """JSON without the fields that 1.x does not save."""
    if isinstance(read, list):
        return [known_fields(part) for part in read]
    if not isinstance(read, dict):
        return read
    return {key: known_fields(value) for key, value in read.items() if key not in NEW_FIELDS}


def compare(old: Path, new: Path) -> None:
    assert known_fields(settings(new)) == settings(old)
    wanted, found = tensors(old), tensors(new)
    assert found.keys() == wanted.keys()
    for file in wanted:
        # 1.x writes a prefix once more below every attention, a safetensors file cannot hold one tensor twice.
        aliases = {key for key in wanted[file] if ".prefix_tuning.pool." in key}
        # The same for the norm before a bottleneck, which is also the first module of its down-projection (C11).
        aliases |= {key for key in wanted[file] if ".adapter_norm_before." in key}
        assert found[file].keys() - aliases == wanted[file].keys() - aliases
        for key in found[file]:
            if ".parametrizations." not in key:
                assert_close(found[file][key], wanted[file][key], key)
        # Many pairs of matrices give the same rotation (E3): another pair is written than was read.
        for read, again in zip(*map(rotations, (wanted[file], found[file])), strict=True):
            assert_close(again, read, "rotation", tolerance=1e-6)


def rotations(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What ``torch.nn.utils.parametrizations.orthogonal``, which 1.x uses, makes of the pairs of matrices in a file."""
    stems = sorted(key.removesuffix(".weight.original") for key in weights if key.endswith(".weight.original"))
    found = []
    for stem in stems:
        rank, width = weights[f"{stem}.weight.original"].shape
        layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, rank, bias=False))
        ends = ("weight.original", "weight.0.base")
        layer.load_state_dict({f"parametrizations.{end}": weights[f"{stem}.{end}"] for end in ends})
        found.append(layer.weight.detach())
    return found


@pytest.mark.parametrize("group", [group for group in GROUPS.values() if group.adapters], ids=lambda group: group.id)
def test_config_strings_mean_the_same(group: Group) -> None:
    """The string that made the adapter gives the configuration that 1.3.0 saved."""
    architecture = next(case.architecture for case in CASES if case.group == group.id and case.inputs)
    for (kind, name), folder in saved(archive(architecture), group).items():
        if kind == "adapters":
            wanted = settings(folder)["adapter_config.json"]["config"]
            assert known_fields(AdapterConfig.load(group.adapters[name]).to_dict()) == wanted


def test_what_is_left_out_has_a_reason() -> None:
    for case in CASES:
        assert case.inputs or case.skipped, case.id


def test_1x_reads_what_this_library_writes() -> None:
    """The evidence of ``check_reverse.py``: every group of the goldens, read by 1.3.0, gives the golden outputs."""
    for architecture, group in SAVED:
        if saved(archive(architecture), GROUPS[group]):
            assert evidence()[f"{architecture}/{group}"]["deviation"] <= 1e-5, f"{architecture}/{group}"
