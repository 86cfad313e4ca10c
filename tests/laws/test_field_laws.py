"""Every field of every configuration does something: none is accepted and ignored.

A row says what a field is changed to, and where that is needed on which model and with which other fields. What
counts is a difference in the parameters, their start, what is trained, the output in evaluation or in training, or the
file. A field that must not be changed is refused.
"""

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from tiny_models import adapted, disturb, inputs, output

from adapters import ConfigError
from adapters.configuration.registry import ARCHITECTURES


@dataclass(frozen=True)
class Row:
    """A changed field: its value, the model, the other fields of both configurations; or one that is refused.

    instead: what it is changed from, if that is not its default.
    """

    value: Any
    model: str = "bert"
    head: bool = False
    refused: bool = False
    instead: Any = None
    others: tuple[tuple[str, Any], ...] = ()


def to(value: Any, model: str = "bert", head: bool = False, instead: Any = None, **others: Any) -> Row:
    return Row(value, model, head, False, instead, tuple(others.items()))


def no(value: Any, **others: Any) -> Row:
    return Row(value, refused=True, others=tuple(others.items()))


PLACES = {
    "selfattn_lora": to(False, intermediate_lora=True),
    "intermediate_lora": to(True),
    "output_lora": to(True),
    "leave_out": to([0]),
    "attn_matrices": to(["q"]),
    "target_modules": to(["key"]),
    "dtype": to("float64"),
}
SEED = {"init_weights_seed": to(1)}
LINEAR = PLACES | SEED | {"dropout": to(0.5)}
LYCORIS = LINEAR | {"r": to(3), "alpha": to(3), "rank_dropout": to(0.5), "module_dropout": to(0.5)}
LORA = LINEAR | {
    "r": to(3),
    "alpha": to(3),
    "composition_mode": to("scale", r=1, init_weights="ia3"),
    "init_weights": to("bert"),
    "use_gating": to(True),
    "use_dora": to(True),
    "vera_d": to(0.7, vera_b=0.1, init_weights="vera"),
    "vera_b": to(0.7, vera_d=0.1, init_weights="vera"),
    "use_rslora": to(True, r=4, alpha=4),
    "rank_pattern": to({"q": 2}),
    "alpha_pattern": to({"q": 2}),
    "lora_bias": to(True),
    "embedding_lora": to(True),
    "lm_head_lora": to(True, "gpt2", True),
    "legacy": to(True, use_dora=True, alpha=16),
    "scaled_inputs": to(["output.dense"], r=1, composition_mode="scale", init_weights="ia3", output_lora=True),
}
MTL_REFUSES = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "embedding_lora", "lm_head_lora", "legacy")
PHM = {"phm_layer": True, "phm_dim": 2, "phm_init_range": 1.0}
PLACED = {"combine": to("prefix_after_bos"), "placement": to("embeddings"), **SEED}
STARTED = {
    "prompt_init": to("from_string", prompt_init_text=[5]),
    "prompt_init_text": to([6], instead=[5], prompt_init="from_string"),
    "random_uniform_scale": to(0.1),
}
ROWS: dict[str, dict[str, Row]] = {
    "lora": LORA,
    "mtl_lora": LORA
    | {name: no(LORA[name].value) for name in MTL_REFUSES}
    | {
        "composition_mode": no("scale", r=1),
        "vera_d": no(0.1),
        "vera_b": no(0.1),
        "n_up_projection": to(2),
        "task_specific_matrix_type": to("linear"),
        "weights_sharpness": to(5.0, n_up_projection=3),
        "scaled_inputs": no(["output.dense"]),
        "shared_experts": no(True),
        "router_lora": no(True),
    },
    "adalora": LINEAR | {"init_r": to(5), "alpha": to(3)},
    "loha": LYCORIS | {"init_weights": to("random")},
    "lokr": LYCORIS
    | {
        "r": to(3, decompose_factor=2),
        "alpha": to(3, r=1),
        "decompose_both": to(True, r=1, decompose_factor=4),
        "decompose_factor": to(2),
        "rank_dropout_scale": to(True, rank_dropout=0.5),
        "init_weights": to("random"),
    },
    "fourierft": LINEAR
    | {
        "init_weights_seed": to(1, init_weights="random"),
        "n_frequency": to(30),
        "scaling": to(30.0),
        "random_loc_seed": to(3),
        "init_weights": to("random"),
    },
    "vblora": LINEAR
    | {
        "r": to(3),
        "num_vectors": to(9),
        "vector_length": to(2),
        "topk": to(3),
        "init_vector_bank_bound": to(0.5),
        "init_logits_std": to(0.5),
    },
    "randlora": PLACES
    | {
        "dropout": to(0.5),
        "r": to(5),
        "alpha": to(30),
        "bases": to("sparse"),
        "projection_prng_key": to(3),
        "save_projection": to(False),
    },
    "oft": LINEAR
    | {
        "init_weights_seed": to(1, init_weights=False),
        "block_size": to(2),
        "block_num": to(2, instead=4, block_size=0),
        "coft": to(True),
        "eps": to(0.5, coft=True),
        "block_share": to(True),
        "use_cayley_neumann": to(False),
        "num_cayley_neumann_terms": to(2),
        "init_weights": to(False),
    },
    "boft": LINEAR
    | {
        "init_weights_seed": to(1, init_weights=False),
        "block_size": to(2),
        "block_num": to(2, instead=4, block_size=0),
        "n_butterfly_factor": to(2),
        "init_weights": to(False),
    },
    "hra": PLACES | SEED | {"r": to(2), "apply_GS": to(True), "init_weights": to(False)},
    "road": PLACES
    | {
        "init_weights_seed": to(1, init_weights=False),
        "variant": to("road_2"),
        "group_size": to(2),
        "init_weights": to(False),
    },
    "miss": LINEAR
    | {
        "init_weights_seed": to(1, init_weights=False),
        "r": to(2),
        "variant": to("bat"),
        "mini_r": to(8, variant="mini"),
        "init_weights": to(False),
    },
    "hira": LINEAR | {"r": to(3)},
    "shira": LINEAR | {"r": to(3), "random_seed": to(3), "init_weights_seed": to(1, random_seed=None)},
    "ln_tuning": {
        "outside_blocks": to(False),
        "bias": to(False),
        "leave_out": to([0]),
        "target_modules": to(["output.LayerNorm"]),
    },
    "bitfit": {
        "attention": to(False),
        "intermediate": to(False),
        "output": to(False),
        "norms": to(False),
        "outside_blocks": to(False),
        "attn_matrices": to(["q"]),
        "leave_out": to([0]),
        "target_modules": to(["query"]),
    },
    "bottleneck": SEED
    | {
        "mh_adapter": to(True),
        "output_adapter": to(False, mh_adapter=True),
        "reduction_factor": to(2),
        "non_linearity": to("tanh"),
        "original_ln_before": to(True),
        "original_ln_after": to(False),
        "ln_before": to(True),
        "ln_after": to(True),
        "init_weights": to("houlsby"),
        "is_parallel": to(True),
        "scaling": to(3.0),
        "use_gating": to(True),
        "residual_before_ln": to(False, original_ln_before=True),
        "adapter_residual_before_ln": to(True, ln_after=True),
        "inv_adapter": to("nice", inv_adapter_reduction_factor=2),
        "inv_adapter_reduction_factor": to(4, instead=2, inv_adapter="nice"),
        "cross_adapter": to(True, "t5"),
        "leave_out": to([0]),
        "dropout": to(0.5),
        "stochastic_depth": to(0.5),
        "phm_layer": to(True, phm_dim=2),
        "phm_dim": to(4, **{**PHM, "phm_dim": 2}),
        "factorized_phm_W": to(False, **PHM),
        "shared_W_phm": to(True, **PHM),
        "shared_phm_rule": to(False, **PHM),
        "factorized_phm_rule": to(True, **PHM),
        "phm_c_init": to("uniform", **PHM),
        "phm_init_range": to(0.3, **PHM),
        "learn_phm": to(False, **PHM),
        "hypercomplex_nonlinearity": to("normal", **PHM),
        "phm_rank": to(2, **PHM),
        "phm_bias": to(False, **PHM),
    },
    "prefix_tuning": SEED
    | {
        "encoder_prefix": to(False, "t5"),
        "cross_prefix": to(False, "t5"),
        "leave_out": to([0]),
        "flat": to(True),
        "prefix_length": to(4),
        "bottleneck_size": to(4),
        "non_linearity": to("relu"),
        "dropout": to(0.5),
        "use_gating": to(True),
        "shared_gating": to(False, use_gating=True),
        "shift_positions": to(True, "gpt2"),
    },
    "prompt_tuning": PLACED | STARTED | {"prompt_length": to(4), "placement": to("tokens")},
    "p_tuning": PLACED
    | {
        "prompt_length": to(4),
        "encoder_reparameterization_type": to("LSTM"),
        "encoder_hidden_size": to(4),
        "encoder_num_layers": to(3, encoder_reparameterization_type="LSTM"),
        "encoder_dropout": to(0.5, encoder_reparameterization_type="LSTM"),
    },
    "multitask_prompt_tuning": PLACED
    | STARTED
    | {
        "prompt_length": to(4),
        "num_ranks": to(2),
    },
    "cpt": PLACED
    | {
        "cpt_token_ids": to([7, 8]),
        "cpt_tokens_type_mask": to([2, 0]),
        "opt_projection_epsilon": to(0.5, cpt_tokens_type_mask=[2, 2]),
        "opt_projection_format_epsilon": to(0.5),
    },
    "reft": SEED
    | {
        "layers": to([1]),
        "prefix_positions": to(2),
        "suffix_positions": to(2),
        "r": to(2),
        "orthogonality": to(True),
        "tied_weights": to(True, suffix_positions=2),
        "dropout": to(0.5),
        "non_linearity": to("tanh"),
        "dtype": to("float64"),
        "output_reft": to(False),
        "subtract_projection": to(False),
        "leave_out": to([0]),
    },
    "trainable_tokens": {"token_indices": to([4, 5]), "dtype": to("float64")},
}
BASES: dict[str, dict[str, Any]] = {
    "bottleneck": {"mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"},
    "prefix_tuning": {"prefix_length": 3, "bottleneck_size": 8},
    "prompt_tuning": {"prompt_length": 3},
    "p_tuning": {"prompt_length": 2, "encoder_hidden_size": 6},
    "multitask_prompt_tuning": {"prompt_length": 3},
    "cpt": {"cpt_token_ids": [5, 6]},
    "reft": {
        "layers": "all", "prefix_positions": 3, "suffix_positions": 0, "r": 1, "orthogonality": False, "dropout": 0.0
    },
    "trainable_tokens": {"token_indices": [4]},
    "adalora": {"init_r": 4, "target_r": 2},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "fourierft": {"n_frequency": 40},
    "vblora": {"r": 2, "num_vectors": 6, "vector_length": 4},
    "randlora": {"r": 3, "alpha": 3},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "hra": {"r": 4},
    "road": {"group_size": 4},
    "miss": {"r": 4},
    "hira": {"r": 2},
    "shira": {"r": 2, "random_seed": 0},
}  # fmt: skip
# Fields whose effect takes more than a pass to see, with the test that sees it.
TOKENIZER = {"tokenizer_name_or_path": "tests/methods/test_prompts.py::test_d12_from_string"}
ELSEWHERE: dict[str, dict[str, str]] = {
    "adalora": dict.fromkeys(
        ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        "tests/methods/test_lora_variants.py: AdaLoRA's steps are PEFT's",
    ),
    "router": dict.fromkeys(("experts", "kind", "level", "top_k", "temperature"), "tests/methods/test_routing.py"),
    "prompt_tuning": TOKENIZER,
    "multitask_prompt_tuning": TOKENIZER
    | {"num_tasks": "tests/methods/test_prompts.py::test_multitask_prompt_tuning_is_pefts"},
    "bitfit": {"missing_too": "tests/methods/test_small_and_reft.py: refused without on models that have no bias"},
}
ELSEWHERE["lora"] = dict.fromkeys(("shared_experts", "router_lora"), "tests/methods/test_experts.py")
# Seeds of a start in which nothing is random.
ELSEWHERE["router"]["init_weights_seed"] = "a gate starts at zero"
ELSEWHERE["randlora"] = {"init_weights_seed": "the diagonals start as constants, and projection_prng_key is the bases'"}
CASES = [(name, field) for name, rows in ROWS.items() for field in rows]


def test_every_field_has_a_row() -> None:
    for name, kind in ARCHITECTURES.items():
        if name in (None, "union"):  # the bottleneck's other name; a list
            continue
        known = {item.name for item in fields(kind)} - {"architecture", "modules"}  # see test_modules_laws.py
        assert known == ROWS.get(name, {}).keys() | ELSEWHERE.get(name, {}).keys(), name


def traces(name: str, row: Row, changes: dict[str, Any], folder: Any) -> dict[str, Any]:
    """All that a configuration can have an effect on."""
    model = adapted(row.model, head=row.head)
    config = ARCHITECTURES[name](**(BASES.get(name, {}) | dict(row.others) | changes))
    before = dict(model.named_parameters())
    torch.manual_seed(0)
    model.add_adapter("a", config)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".a." in key}
    model.train_adapter("a")
    trained = {key for key, tensor in model.named_parameters() if tensor.requires_grad}
    trained -= before.keys()
    disturb(model, "a")
    found = {"start": start, "trained": trained, "output": output(model, inputs(row.model))}
    model.save_adapter(folder, "a")
    found["file"] = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.1:  # the model's own
            module.p = 0.0
    torch.manual_seed(0)
    return found | {"training": output(model, inputs(row.model))}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize(("name", "field"), CASES, ids=map("-".join, CASES))
def test_a_field_has_an_effect(name: str, field: str, tmp_path) -> None:
    row = ROWS[name][field]
    if row.refused:
        with pytest.raises(ConfigError, match=field):
            ARCHITECTURES[name](**(BASES.get(name, {}) | dict(row.others) | {field: row.value}))
        return
    unchanged = {} if row.instead is None else {field: row.instead}
    assert ARCHITECTURES[name](**(BASES.get(name, {}) | dict(row.others) | unchanged))[field] != row.value
    if field == "output_reft":  # without it there is no ReFT
        with pytest.raises(ValueError, match="output_reft"):
            traces(name, row, {field: row.value}, tmp_path)
        return
    base = traces(name, row, unchanged, tmp_path / "base")
    assert not same(base, traces(name, row, {field: row.value}, tmp_path / "changed"))
    assert same(base, traces(name, row, unchanged, tmp_path / "again"))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"])
@pytest.mark.parametrize("others", [{"vera_d": 0.1, "vera_b": 0.0}, {"composition_mode": "scale", "r": 1}])
def test_options_of_lora_are_refused_where_they_mean_nothing(field: str, others: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{field}.* not possible with"):
        ARCHITECTURES["lora"](**others, init_weights="bert", **{field: LORA[field].value})


def test_a_field_that_does_nothing_is_found(tmp_path) -> None:
    """The width of a network that a flat prefix does not have."""
    row = to(9, flat=True)
    parts = [traces("prefix_tuning", row, {"bottleneck_size": size}, tmp_path / str(size)) for size in (8, 9)]
    assert same(*parts)
