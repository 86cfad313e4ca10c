"""Nothing that 1.x offers is without a golden or a law: every identifier of a configuration, all that methods do."""

import re
from pathlib import Path

import pytest
from golden import CASES, GROUPS

from adapters import ADAPTER_CONFIG_MAP, AdapterConfig, ConfigUnion

TESTS = Path(__file__).parents[1]

# The identifiers of 1.3.0; several names of one configuration stand together.
IDENTIFIERS = """
seq_bn pfeiffer / double_seq_bn houlsby / par_bn parallel / scaled_par_bn scaled_parallel / seq_bn_inv pfeiffer+inv /
double_seq_bn_inv houlsby+inv / compacter / compacter++ / prefix_tuning / prefix_tuning_flat / prompt_tuning / lora /
ia3 / vera / dora / dvora / mtl_lora / loreft / noreft / direft / mam / unipelt
"""
NAMES = [names.split() for names in IDENTIFIERS.split("/")]

# What 1.3.0's methods can do, and where it is tested.
ROWS = {
    "Compacter": "methods/test_compacter.py::test_every_combination_is_the_sum_of_kronecker_products",
    "Compacter: shared once": "methods/test_compacter.py::test_shared_tensors_are_held_once",
    "Compacter: starts": "methods/test_compacter.py::test_c10_every_start_is_the_configured_one",
    "NICE": "methods/test_invertible.py::test_nice_is_its_formula",
    "GLOW": "methods/test_invertible.py::test_glow_is_its_formula",
    "inverse of forward": "methods/test_invertible.py::test_there_and_back_is_the_identity",
    "inverse before the head": "methods/test_invertible.py::test_static_heads_undo_it",
    "scalings": "methods/test_bottleneck.py::test_scaling_starts_as_configured",
    "stochastic depth": "methods/test_bottleneck.py::test_stochastic_depth_drops_rows_and_keeps_the_mean",
    "houlsby's start": "methods/test_bottleneck.py::test_houlsby_starts_small_and_without_biases",
    "prompts: starts": "methods/test_prompts.py::test_d12_from_string",
    "prompts: combine": "methods/test_prompts.py::test_after_the_first_token",
    "prompts: masks": "methods/test_prompts.py::test_a_row_does_not_depend_on_its_padding",
    "prompts: generate": "methods/test_prompts.py::test_generation_with_a_cache_is_that_without",
    "LoRA's family: formulas": "methods/test_lora_family.py::test_each_map_follows_the_formula",
    "LoRA's family: merging": "methods/test_lora_family.py::test_merged_is_unmerged_and_reset_is_bit_for_bit",
    "MTL-LoRA": "methods/test_lora_family.py::test_tasks_share_a_batch",
    "LoRA: rsLoRA, patterns, bias": "methods/test_lora_variants.py::test_options_are_those_of_peft",
    "LoRA: vocabulary": "methods/test_lora_variants.py::test_vocabulary",
    "LoRA: PiSSA, OLoRA": "methods/test_lora_variants.py::test_starts_are_those_of_peft_and_change_nothing",
    "LoRA: EVA": "methods/test_lora_variants.py::test_eva_finds_the_principal_components",
    "LoRA: LoRA-GA": "methods/test_lora_variants.py::test_lora_ga_reads_the_gradient_and_leaves_none",
    "LoRA+": "methods/test_lora_variants.py::test_loraplus",
    "ReFT: positions": "methods/test_small_and_reft.py::test_reft_changes_the_first_and_last_real_tokens",
    "ReFT: leave_out, layers": "methods/test_small_and_reft.py::test_e8_layers_are_checked_and_left_out",
    "unions": "methods/test_unions.py::test_a_union_of_two_methods_is_their_stack",
    "unions: MAM, UniPELT": "methods/test_unions.py::test_unions_of_papers_act_with_all_their_members",
    "gating scores": "parity/test_gates.py::test_gating_scores",
    "reduction_factor by layer": "methods/test_unions.py::test_a_reduction_factor_for_each_layer",
    "leave_out": "methods/test_unions.py::test_layers_are_left_out",
    "cross_adapter": "defects/test_method_defects.py::test_c4_c6_cross_attention_has_a_flag_of_its_own",
    "every field": "laws/test_field_laws.py::test_a_field_has_an_effect",
    "fusion attentions": "parity/test_outputs.py::test_fusion_attentions",
    "several heads": "parity/test_outputs.py::test_several_heads_with_labels",
}


def kinds(config: AdapterConfig) -> list[tuple[object, ...]]:
    """What its members are; presets read back from a string keep their class."""
    members = config.configs if isinstance(config, ConfigUnion) else [config]
    return [(type(member), member.get("flat"), member.get("scaling")) for member in members]


GOLDEN_KINDS = [
    kinds(AdapterConfig.load(text))
    for group in {case.group for case in CASES if case.inputs}
    for text in GROUPS[group].adapters.values()
]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_every_identifier_has_a_golden(names: list[str]) -> None:
    for name in names:
        assert ADAPTER_CONFIG_MAP[name] == ADAPTER_CONFIG_MAP[names[0]]
        assert kinds(AdapterConfig.load(name)) in GOLDEN_KINDS


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_test(row: str) -> None:
    file, name = ROWS[row].split("::")
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text("utf-8"), re.MULTILINE)
