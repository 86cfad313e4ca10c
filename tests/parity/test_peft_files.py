"""Folders of PEFT: loaded here, and written for PEFT, with equal outputs."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config, disturb, inputs, plain
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification, BertForMaskedLM

import adapters
from adapters import AdapterError, LoRAConfig
from adapters.checkpoints.peft.lora import OTHER_WEIGHTS
from adapters.checkpoints.peft.table import form_of_type
from adapters.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT asks for it
    "ignore:.*symmetric initialization",
    "ignore:Specified to not save:UserWarning",
    "ignore:Sparse invariant checks:UserWarning",
    "ignore:Failed to load the CUDA extension:UserWarning",
    "ignore:Setting boft_n_butterfly_factor to 1:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Adapter 'default'. 4 LoRA tensor.s. have invalid shape",  # lora_B.bias has one dimension
    "ignore:Unsupported layer type:UserWarning",
)


def bare(architecture: str, task: str | None) -> Any:
    """A tiny model for one of PEFT's tasks."""
    if task == "SEQ_CLS":
        torch.manual_seed(7)
        kind = AutoModelForImageClassification if architecture == "vit" else AutoModelForSequenceClassification
        return kind.from_config(config(architecture)).eval()
    return plain(architecture, head=task not in (None, "FEATURE_EXTRACTION"))


def logits(model: Any, architecture: str, **extra: Any) -> torch.Tensor:
    """What the model makes of the batch."""
    batch = inputs(architecture)
    with torch.no_grad():
        return model(**batch, **extra)[0]


def trained(architecture: str, configuration: peft.PeftConfig, scale: float = 0.3) -> Any:
    """PEFT's model, with noise on all that its adapter trains."""
    torch.manual_seed(3)
    model = peft.get_peft_model(bare(architecture, configuration.task_type), configuration)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def ours(architecture: str, task: str | None) -> Any:
    model = bare(architecture, task)
    adapters.init(model)
    return model


def check(theirs: Any, architecture: str, folder: Any, task: str | None = None, **extra: Any) -> Any:
    """Save with PEFT, load here, compare; returns our model."""
    task = task or theirs.peft_config["default"].task_type
    theirs.save_pretrained(folder)
    model = ours(architecture, task)
    before = logits(model, architecture)
    model.load_adapter(folder, load_as="x", set_active=True)
    expected, found = logits(theirs, architecture, **extra), logits(model, architecture, **extra)
    expected = expected[:, -found.shape[1] :]  # PEFT's outputs have the prompt's positions too
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, found[:, -before.shape[1] :], atol=1e-5)
    return model


def check_back(model: Any, architecture: str, task: str | None, folder: Any, **extra: Any) -> None:
    """Save here for PEFT, load there, compare."""
    held = [site for site, _ in model.adapter_sites.holding("x") if site.place.outside == "classifier"]
    model.save_adapter(folder, "x", with_head=not held, format="peft")
    theirs = peft.PeftModel.from_pretrained(bare(architecture, task), folder).eval()
    expected, found = logits(model, architecture, **extra), logits(theirs, architecture, **extra)
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, rtol=1e-5, atol=1e-5)


CLS = {"task_type": "SEQ_CLS"}
LM = {"task_type": "CAUSAL_LM"}
LINEAR = ["query", "intermediate.dense"]
METHODS: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "lora": ("bert", partial(peft.LoraConfig, r=3, lora_alpha=5, target_modules=["query", "value"], **CLS)),
    "adalora": ("bert", partial(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=9, target_modules=LINEAR, **CLS)),
    "vera": ("bert", partial(peft.VeraConfig, r=4, target_modules=["query", "dense"], **CLS)),
    "vera_drawn": ("bert", partial(peft.VeraConfig, r=4, target_modules=LINEAR, save_projection=False, **CLS)),
    "ia3": ("bert", partial(peft.IA3Config, **CLS)),
    "loha": ("bert", partial(peft.LoHaConfig, r=2, alpha=3, target_modules=LINEAR, **CLS)),
    "lokr": ("bert", partial(peft.LoKrConfig, r=2, alpha=3, target_modules=LINEAR, **CLS)),
    "lokr_both": ("bert", partial(peft.LoKrConfig, r=1, decompose_both=True, target_modules=LINEAR, **CLS)),
    "fourierft": ("bert", partial(peft.FourierFTConfig, n_frequency=30, scaling=10, target_modules=LINEAR, **CLS)),
    "vblora": ("bert", partial(peft.VBLoRAConfig, r=2, num_vectors=6, vector_length=4, target_modules=LINEAR, **CLS)),
    "vblora_best": (
        "bert",
        partial(
            peft.VBLoRAConfig, num_vectors=6, vector_length=4, save_only_topk_weights=True, target_modules=LINEAR, **CLS
        ),
    ),
    "randlora": ("bert", partial(peft.RandLoraConfig, r=3, randlora_alpha=4, target_modules=LINEAR, **CLS)),
    "shira": ("bert", partial(peft.ShiraConfig, r=2, target_modules=LINEAR, **CLS)),
    "hira": ("bert", partial(peft.HiraConfig, r=2, target_modules=LINEAR, **CLS)),
    "oft": ("bert", partial(peft.OFTConfig, oft_block_size=4, target_modules=LINEAR, **CLS)),
    "oft_blocks": (
        "bert",
        partial(peft.OFTConfig, r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=LINEAR, **CLS),
    ),
    "boft": ("bert", partial(peft.BOFTConfig, boft_block_size=4, target_modules=LINEAR, **CLS)),
    "hra": ("bert", partial(peft.HRAConfig, r=2, target_modules=LINEAR, **CLS)),
    "miss": ("bert", partial(peft.MissConfig, r=4, target_modules=LINEAR, **CLS)),
    "miss_mini": ("bert", partial(peft.MissConfig, r=4, mini_r=8, init_weights="mini", target_modules=LINEAR, **CLS)),
    "miss_bat": ("bert", partial(peft.MissConfig, r=4, init_weights="bat", target_modules=LINEAR, **CLS)),
    "road": ("bert", partial(peft.RoadConfig, group_size=8, variant="road_2", target_modules=LINEAR, **CLS)),
    "ln_tuning": ("bert", partial(peft.LNTuningConfig, target_modules=["LayerNorm"], **CLS)),
    "ln_tuning_some": ("llama", partial(peft.LNTuningConfig, target_modules=["input_layernorm"], **LM)),
    "trainable_tokens": (
        "bert",
        partial(peft.TrainableTokensConfig, token_indices=[*range(3, 20)], target_modules=["word_embeddings"]),
    ),
    "prompt": ("gpt2", partial(peft.PromptTuningConfig, num_virtual_tokens=3, **LM)),
    "prompt_of_an_encoder": (
        "bert",
        partial(peft.PromptTuningConfig, num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
    ),
    "prompt_t5": (
        "t5",
        partial(peft.PromptTuningConfig, num_virtual_tokens=3, num_transformer_submodules=1, task_type="SEQ_2_SEQ_LM"),
    ),
    "p_tuning": ("llama", partial(peft.PromptEncoderConfig, num_virtual_tokens=3, **LM)),
    "multitask_prompt": ("gpt2", partial(peft.MultitaskPromptTuningConfig, num_virtual_tokens=3, num_tasks=2, **LM)),
    "cpt": ("llama", partial(peft.CPTConfig, cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 3], **LM)),
    "prefix": ("bert", partial(peft.PrefixTuningConfig, num_virtual_tokens=3, **CLS)),
    "prefix_projection": ("gpt2", partial(peft.PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True, **LM)),
    "prefix_grouped": ("llama", partial(peft.PrefixTuningConfig, num_virtual_tokens=3, **LM)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_in_and_out(name: str, tmp_path) -> None:
    architecture, configuration = METHODS[name]
    extra = {"task_ids": torch.tensor([1, 0, 0, 1])} if name == "multitask_prompt" else {}
    theirs = trained(architecture, configuration())
    model = check(theirs, architecture, tmp_path / "in", **extra)
    check_back(model, architecture, theirs.peft_config["default"].task_type, tmp_path / "out", **extra)


# --- LoRA's options ---------------------------------------------------------------------------------------------------

QV = {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"], **CLS}
ATTENTION = ["q_proj", "v_proj"]
LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("bert", QV | {"use_rslora": True}),
    "dora": ("bert", QV | {"use_dora": True}),
    "dora_conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **LM}),
    "lora_bias": ("bert", QV | {"lora_bias": True}),
    "bias_all": ("bert", QV | {"bias": "all"}),
    "bias_lora_only": ("bert", QV | {"bias": "lora_only"}),
    "bias_both": ("bert", QV | {"bias": "lora_only", "lora_bias": True}),
    "rank_pattern": ("bert", QV | {"rank_pattern": {"0.attention.self.query": 5, "value": 2}}),
    "alpha_pattern": (
        "bert",
        QV | {"use_rslora": True, "alpha_pattern": {r"layer\.0.*value": 9, "query": 1, "value": 7}},
    ),
    "layers_to_transform": ("bert", QV | {"layers_to_transform": [1], "layers_pattern": "layer"}),
    "regex": ("bert", QV | {"target_modules": r".*layer\.1.*(key|output\.dense)"}),
    "exclude_modules": ("bert", QV | {"exclude_modules": r".*layer\.0.*query"}),
    "all_linear": ("bert", QV | {"target_modules": "all-linear"}),
    "all_linear_llama": ("llama", {"target_modules": "all-linear", **LM}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, **LM}),
    "t5": ("t5", {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "bart": ("bart", {"target_modules": [*ATTENTION, "fc2"], "task_type": "SEQ_2_SEQ_LM"}),
    "bart_cross": ("bart", {"target_modules": r".*decoder.*encoder_attn.q_proj", "task_type": "SEQ_2_SEQ_LM"}),
    "vit": ("vit", {"target_modules": ["q_proj", "fc1"], **CLS}),
    "classifier_itself": ("bert", QV | {"target_modules": ["query", "classifier"], "task_type": None}),
    "embeddings": ("bert", QV | {"target_modules": ["query", "word_embeddings"]}),
    "embeddings_llama": ("llama", {"target_modules": ["embed_tokens", "q_proj"], **LM}),
    "embeddings_gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True, **LM}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"], **LM}),
    "tokens": ("bert", QV | {"trainable_token_indices": [*range(3, 20)]}),
    "tokens_tied": (
        "gpt2",
        {"trainable_token_indices": {"wte": [*range(3, 20)]}, "target_modules": ["c_fc"], "fan_in_fan_out": True, **LM},
    ),
    "tokens_alone": ("bert", QV | {"trainable_token_indices": [*range(3, 20)], "target_modules": ["query"]}),
    "target_parameters": ("bert", QV | {"target_modules": ["value"], "target_parameters": ["query.weight"]}),
    "pissa": ("bert", QV | {"init_lora_weights": "pissa"}),
    "pissa_conv1d": (
        "gpt2",
        {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True, **LM},
    ),
    "olora": ("bert", QV | {"init_lora_weights": "olora", "use_rslora": True}),
    "gaussian": ("bert", QV | {"init_lora_weights": "gaussian"}),
    "orthogonal": ("bert", QV | {"r": 4, "init_lora_weights": "orthogonal"}),
    "modules_to_save": ("bert", QV | {"modules_to_save": ["classifier"], "task_type": None}),
    "map_onto_words": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"], **LM}),
    "bias_all_gpt2": ("gpt2", {"bias": "all", "target_modules": ["c_proj"], "fan_in_fan_out": True, **LM}),
    "prefix_free": ("bert", {"r": 3, "target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
}


@pytest.mark.parametrize("name", LORA)
def test_every_option_of_lora_goes_in_and_out(name: str, tmp_path) -> None:
    architecture, fields = LORA[name]
    own = {"classifier_itself": "SEQ_CLS", "modules_to_save": "SEQ_CLS"}.get(name, fields["task_type"])
    torch.manual_seed(3)
    theirs = peft.get_peft_model(bare(architecture, own), peft.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = check(theirs.eval(), architecture, tmp_path / "in", task=own)
    check_back(model, architecture, own, tmp_path / "out")


# --- from a live model ------------------------------------------------------------------------------------------------


TAKEN = ["lora", "ia3", "vera", "oft", "miss_bat", "ln_tuning", "prompt", "prefix", "trainable_tokens"]


@pytest.mark.parametrize("name", TAKEN)
def test_init_takes_adapters_over(name: str) -> None:
    architecture, configuration = METHODS[name]
    theirs = trained(architecture, configuration())
    expected, plain_model = logits(theirs, architecture), theirs.get_base_model()
    model: Any = adapters.init(theirs)
    assert model is plain_model
    assert model.active_adapters == adapters.Stack("default")
    assert not [module for module in model.modules() if type(module).__module__.startswith("peft.")]
    found = logits(model, architecture)
    torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_init_keeps_weights_that_peft_has_changed(start: str) -> None:
    theirs = trained("bert", peft.LoraConfig(**QV, init_lora_weights=start))
    expected = logits(theirs, "bert")
    model: Any = adapters.init(theirs)
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-5, atol=1e-5)
    assert model.adapters_config.get("default").init_weights == "lora"


def test_init_takes_all_adapters_and_what_is_trained() -> None:
    theirs = trained("bert", peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
    theirs.add_adapter("other", peft.LoraConfig(r=3, target_modules=["key"], task_type="FEATURE_EXTRACTION"))
    theirs.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    expected = logits(theirs, "bert")
    model: Any = adapters.init(theirs)
    assert model.active_adapters == adapters.Stack("default", "other")
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-5, atol=1e-5)
    assert not model.training
    trained_here = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained_here
    assert all(".loras." in name for name in trained_here)


def test_init_of_a_model_that_cannot_be_taken_over_changes_nothing() -> None:
    theirs = trained("bert", peft.LoHaConfig(r=2, rank_pattern={"query": 3}, target_modules=LINEAR, **CLS))
    expected, modules = logits(theirs, "bert"), [type(module) for module in theirs.modules()]
    with pytest.raises(AdapterError, match=r"adapters.init\(PeftModel\): rank_pattern=.* cannot be mapped"):
        adapters.init(theirs)
    assert [type(module) for module in theirs.modules()] == modules
    torch.testing.assert_close(logits(theirs, "bert"), expected, rtol=0, atol=0)


def test_init_of_a_merged_or_mixed_model() -> None:
    theirs = trained("bert", peft.LoraConfig(**QV))
    theirs.merge_adapter()
    with pytest.raises(AdapterError, match=r"merged into the weights; call unmerge_adapter\(\) first"):
        adapters.init(theirs)
    mixed = peft.get_peft_model(bare("bert", None), peft.LoraConfig(target_modules=["query"]), mixed=True)
    with pytest.raises(AdapterError, match="load the adapters one by one"):
        adapters.init(mixed)


def test_init_of_a_model_with_modules_of_peft_inside(tmp_path) -> None:
    theirs = trained("bert", peft.LoraConfig(**QV))
    with pytest.raises(AdapterError, match=r"it has modules of PEFT inside.*give the PeftModel itself"):
        adapters.init(theirs.get_base_model())
    (by_transformers := bare("bert", None)).add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(AdapterError, match="load PEFT's folder with load_adapter"):
        adapters.init(by_transformers)


# --- together with others, and what is refused ------------------------------------------------------------------------


def test_a_lora_of_peft_and_a_bottleneck_in_one_stack(tmp_path) -> None:
    """The stack is PEFT's LoRA merged into the weights, with the bottleneck alone on top."""
    theirs = trained("bert", peft.LoraConfig(**QV))
    theirs.save_pretrained(tmp_path)
    model, merged = ours("bert", "SEQ_CLS"), theirs.merge_and_unload()
    model.load_adapter(tmp_path, load_as="lora")
    adapters.init(merged)
    for each in (model, merged):
        torch.manual_seed(5)
        each.add_adapter("bottleneck", "double_seq_bn[reduction_factor=2]")
        disturb(each, "bottleneck")
    model.set_active_adapters(adapters.Stack("lora", "bottleneck"))
    merged.set_active_adapters("bottleneck")
    torch.testing.assert_close(logits(model, "bert"), logits(merged, "bert"), rtol=1e-5, atol=1e-5)


def saved(folder: Any, **changes: Any) -> Any:
    """A folder of a LoRA of PEFT with other options."""
    trained("bert", peft.LoraConfig(**QV)).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] cannot be mapped"),
        *(({name: True}, f"{name}=True cannot be mapped") for name in form_of_type("", "LORA").unused),
        *(({"init_lora_weights": start}, f"init_lora_weights='{start}' cannot be mapped") for start in OTHER_WEIGHTS),
        ({"init_lora_weights": "loftq"}, r"init_lora_weights='loftq' cannot be mapped.*path_initial_model"),
        ({"peft_type": "ADAPTION_PROMPT"}, "peft_type='ADAPTION_PROMPT' has no counterpart here"),
        ({"peft_type": "C3A"}, "peft_type='C3A' has no counterpart here"),
        ({"peft_type": "IA3"}, "the file has no tensors of IA3, but 'bert.encoder"),
        ({"r": "x"}, r"adapter_config.json cannot be used: LoRAConfig\(r='x'\)"),
        ({"alpha_pattern": [1]}, "adapter_config.json cannot be used: 'list' object has no attribute 'items'"),
        ({"alpha_pattern": {"(": 1}}, r"adapter_config.json cannot be used: missing \)"),
    ],
)
def test_what_cannot_be_mapped_is_refused(changes: dict[str, Any], message: str, tmp_path) -> None:
    model = ours("bert", "SEQ_CLS")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(saved(tmp_path, **changes))
    assert before.keys() == model.state_dict().keys()
    assert not model.adapters_config.adapters


def test_shapes_that_differ_are_told_without_guesses_at_the_base_model(tmp_path) -> None:
    trained("bert", peft.LoraConfig(**QV)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {key: tensor.repeat(1, 2) if tensor.dim() == 2 else tensor for key, tensor in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"must be equal; this model is a Bert.*\(model_type 'bert'"):
        ours("bert", "SEQ_CLS").load_adapter(tmp_path)


def test_modules_without_a_place_are_named(tmp_path) -> None:
    model = ours("roberta", None)
    with pytest.raises(CheckpointError, match=r"target_modules=.* has no place for LORA at 'model.decoder.layers.0"):
        trained("bart", peft.LoraConfig(target_modules=["fc1"], task_type="SEQ_2_SEQ_LM")).save_pretrained(tmp_path)
        model.load_adapter(tmp_path)


def test_weights_of_the_base_model_are_refused(tmp_path) -> None:
    trained("bert", peft.LoraConfig(**QV, modules_to_save=["pooler"])).save_pretrained(tmp_path)
    model = ours("bert", "SEQ_CLS")
    with pytest.raises(CheckpointError, match=r"modules_to_save=.*'bert.pooler.dense.bias'.* of the base model"):
        model.load_adapter(tmp_path)
    assert not model.adapters_config.adapters
    with pytest.raises(CheckpointError, match=r"leave_out=.* has no meaning for an adapter of PEFT"):
        model.load_adapter(tmp_path, leave_out=[0])


def test_unknown_options_warn(tmp_path) -> None:
    model = ours("bert", "SEQ_CLS")
    with pytest.warns(UserWarning, match=r"the options \{'shiny': True\} of PEFT are not known here"):
        model.load_adapter(saved(tmp_path, shiny=True, dull=None))


def test_ranks_that_adalora_has_found(tmp_path) -> None:
    """PEFT's file has the triplets that are left, and which they are."""
    theirs = trained("bert", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=LINEAR, **CLS))
    masks, base = {}, "base_model.model.bert.encoder.layer"
    for path, kept in ((f"{base}.0.attention.self.query", [0, 3]), (f"{base}.1.intermediate.dense", [2])):
        module = theirs.get_submodule(path)
        mask = torch.tensor([index in kept for index in range(4)])
        with torch.no_grad():
            module.lora_E["default"][~mask] = 0
        masks[f"{path.removeprefix('base_model.model.')}.lora_E.default"] = mask.tolist()
    theirs.peft_config["default"].rank_pattern = masks
    check(theirs, "bert", tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("seq_bn", "no counterpart of SeqBnConfig"),
        ("lora[use_gating=True]", "use_gating=True cannot be mapped"),
        ("dvora", "no counterpart of DvoRAConfig"),
        ("mam", "no union of PrefixTuningConfig and ParBnConfig"),
        ("prefix_tuning", "shift_positions=False cannot be mapped"),
        ("prompt_tuning", "placement='auto' cannot be mapped"),
    ],
)
def test_what_peft_cannot_express_is_refused(config: str, message: str, tmp_path) -> None:
    model = ours("bert", "SEQ_CLS")
    model.add_adapter("x", config)
    with pytest.raises(CheckpointError, match=message):
        model.save_adapter(tmp_path, "x", format="peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("vera", r"slices of fused projections, such as 'h.0.attn.c_attn.q', and PEFT's VERA at whole modules"),
        ("hra[target_modules=['c_attn']]", r"the module at 'h.0.attn.c_attn' is a Conv1D, which PEFT's HRA"),
    ],
)
def test_maps_that_peft_does_not_take_are_refused(config: str, message: str, tmp_path) -> None:
    (model := ours("gpt2", "CAUSAL_LM")).add_adapter("x", config)
    with pytest.raises(CheckpointError, match=message):
        model.save_adapter(tmp_path, "x", format="peft")
    assert not list(tmp_path.iterdir())


def test_biases_beside_another_method_are_refused(tmp_path) -> None:
    norms = adapters.BitFitConfig(attention=False, intermediate=False, output=False)
    added = adapters.BitFitConfig(attention=False, missing_too=True)
    for architecture, one, other, message in (
        ("bert", adapters.IA3Config(), norms, "PEFT trains biases beside LoRA, not beside IA3"),
        ("llama", adapters.LoRAConfig(), added, "missing_too=True cannot be mapped"),
    ):
        (model := ours(architecture, None)).add_adapter("x", adapters.ConfigUnion(one, other))
        with pytest.raises(CheckpointError, match=message):
            model.save_adapter(tmp_path, "x", format="peft")
    assert not list(tmp_path.iterdir())


def test_formats_have_names(tmp_path) -> None:
    model = ours("bert", "SEQ_CLS")
    model.add_adapter("x", "lora")
    with pytest.raises(CheckpointError, match="there are the formats 'adapters' and 'peft'"):
        model.save_adapter(tmp_path, "x", format="pefd")


# --- ours for PEFT ----------------------------------------------------------------------------------------------------

OWN: dict[str, tuple[str, str | None, Any]] = {
    "fused": ("gpt2", "CAUSAL_LM", LoRAConfig(r=2, alpha=3, attn_matrices=["q", "v", "o"], output_lora=True)),
    "fused_bias": ("gpt2", "CAUSAL_LM", LoRAConfig(r=2, attn_matrices=["k"], lora_bias=True, use_rslora=True)),
    "fused_dora": ("gpt2", "CAUSAL_LM", LoRAConfig(r=2, attn_matrices=["q", "v"], use_dora=True)),
    "fused_ia3": ("gpt2", "CAUSAL_LM", "ia3"),
    "ia3": ("llama", "CAUSAL_LM", "ia3"),
    "pissa": ("bert", "SEQ_CLS", LoRAConfig(r=2, init_weights="pissa", leave_out=[0])),
    "ranks": ("llama", "CAUSAL_LM", LoRAConfig(r=2, rank_pattern={"0": 3}, alpha_pattern={"q": 5})),
    "vocabulary": ("llama", "CAUSAL_LM", LoRAConfig(r=2, embedding_lora=True, lm_head_lora=True)),
    "vera": ("llama", "CAUSAL_LM", adapters.VeraConfig(r=4, alpha=6)),
    "whole_fused_vera": ("gpt2", "CAUSAL_LM", adapters.VeraConfig(r=4, target_modules=["c_attn"])),
    "randlora": ("llama", "CAUSAL_LM", adapters.RandLoRAConfig(r=3, target_modules="all-linear")),
    "p_tuning": ("gpt2", "CAUSAL_LM", adapters.PTuningConfig(prompt_length=3, encoder_hidden_size=6)),
    "prefix": ("llama", "CAUSAL_LM", adapters.PrefixTuningConfig(prefix_length=3, shift_positions=True)),
    "adalora": ("bert", "SEQ_CLS", adapters.AdaLoRAConfig(init_r=3, target_r=2)),
    "biases": (
        "gpt2",
        "CAUSAL_LM",
        adapters.ConfigUnion(
            LoRAConfig(attn_matrices=["q"]), adapters.BitFitConfig(attn_matrices=["v", "o"], leave_out=[1])
        ),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_ours_are_loaded_by_peft(name: str, tmp_path) -> None:
    architecture, task, configuration = OWN[name]
    model = ours(architecture, task)
    model.add_adapter("x", configuration, set_active=True)
    disturb(model, "x")
    check_back(model, architecture, task, tmp_path)


def test_a_trained_map_onto_words_is_written(tmp_path) -> None:
    model = ours("llama", "CAUSAL_LM")
    model.add_adapter("x", "lora")
    model.train_adapter("x")
    model.save_adapter(tmp_path / "frozen", "x", format="peft")
    assert json.loads((tmp_path / "frozen/adapter_config.json").read_text()).get("modules_to_save") is None
    model.freeze_embeddings(False)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    check_back(model.eval(), "llama", "CAUSAL_LM", tmp_path / "trained")


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")
def test_a_named_head_of_words_is_written_whole(tmp_path) -> None:
    torch.manual_seed(0)
    model = adapters.AutoAdapterModel.from_config(config("bert")).eval()
    model.add_adapter("x", "lora", set_active=True)
    model.add_masked_lm_head("x")
    disturb(model, "x")
    model.save_adapter(tmp_path / "adapter", "x", format="peft")
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("heads.")}
    plain_model = BertForMaskedLM(config("bert")).eval()
    plain_model.load_state_dict(
        {key: each for key, each in state.items() if "adapters" not in key and "loras" not in key}, strict=False
    )
    theirs = peft.PeftModel.from_pretrained(plain_model, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs, "bert"), logits(model, "bert"), rtol=1e-5, atol=1e-5)


def test_all_adapters_are_written_for_peft(tmp_path) -> None:
    model = ours("bert", "SEQ_CLS")
    for name in ("a", "b"):
        model.add_adapter(name, "lora[r=2]")
        disturb(model, name)
    model.save_all_adapters(tmp_path, format="peft")
    for name in ("a", "b"):
        model.set_active_adapters(name)
        theirs = peft.PeftModel.from_pretrained(bare("bert", "SEQ_CLS"), tmp_path / name).eval()
        torch.testing.assert_close(logits(theirs, "bert"), logits(model, "bert"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [3, 5])
def test_a_head_of_peft_becomes_a_named_head(labels: int, tmp_path) -> None:
    theirs = trained("bert", peft.LoraConfig(**QV))
    weight = torch.randn(labels, theirs.config.hidden_size)
    theirs.classifier.modules_to_save["default"].weight = torch.nn.Parameter(weight)
    theirs.classifier.modules_to_save["default"].bias = torch.nn.Parameter(torch.randn(labels))
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(7)
    model = adapters.AutoAdapterModel.from_config(config("bert")).eval()
    model.base_model.load_state_dict(bare("bert", "SEQ_CLS").bert.state_dict())
    model.load_adapter(tmp_path, load_as="x", set_active=True)
    model.active_head = "x"
    torch.testing.assert_close(logits(model, "bert"), logits(theirs, "bert"), rtol=1e-5, atol=1e-5)
    assert len(model.get_labels("x")) == labels  # whatever the model's config says
    model.load_adapter(tmp_path, load_as="y", with_head=False)
    assert list(model.heads) == ["x"]


@pytest.mark.parametrize("labels", [2, 3])
def test_a_named_head_becomes_one_of_peft(labels: int, tmp_path) -> None:
    (described := config("bert")).num_labels = labels
    model = adapters.AutoAdapterModel.from_config(described).eval()
    model.add_adapter("x", LoRAConfig(r=2, rank_pattern={"0": 3}), set_active=True)
    disturb(model, "x")
    model.add_classification_head("x", num_labels=labels, layers=1, use_pooler=True)
    model.add_causal_lm_head("words")
    model.active_head = "x"
    model.save_adapter(tmp_path, "x", format="peft")
    static = AutoModelForSequenceClassification.from_config(described).eval()
    own = {key: tensor for key, tensor in model.base_model.state_dict().items() if "loras" not in key}
    static.bert.load_state_dict(own)
    theirs = peft.PeftModel.from_pretrained(static, tmp_path).eval()
    torch.testing.assert_close(logits(theirs, "bert"), logits(model, "bert"), rtol=1e-5, atol=1e-5)
    model.add_adapter("deep", "lora[r=2]")
    model.add_classification_head("deep", num_labels=labels, layers=2)
    with pytest.raises(CheckpointError, match="the head 'deep' cannot be one of transformers: its layers is 2"):
        model.save_adapter(tmp_path / "deep", "deep", format="peft")
    model.save_adapter(tmp_path / "deep", "deep", with_head=False, format="peft")
    model.add_adapter("bare", LoRAConfig(r=2, rank_pattern={"0": 3}), set_active=True)
    disturb(model, "bare")
    model.save_adapter(tmp_path / "bare", "bare", format="peft")
    encoder = AutoModel.from_config(described).eval()
    encoder.load_state_dict(own)
    theirs = peft.PeftModel.from_pretrained(encoder, tmp_path / "bare").eval()
    torch.testing.assert_close(logits(theirs, "bert"), logits(model.base_model, "bert"), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # the second ones, which PEFT ties
def test_trained_tokens_of_a_tied_model(tmp_path) -> None:
    """PEFT writes them twice, for the embeddings and for the map onto words."""
    theirs = trained("gpt2", peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["wte"], **LM))
    theirs.save_pretrained(tmp_path / "theirs")
    (model := ours("gpt2", "CAUSAL_LM")).load_adapter(tmp_path / "theirs", set_active=True)
    torch.testing.assert_close(logits(model, "gpt2"), logits(theirs, "gpt2"), rtol=1e-5, atol=1e-5)
    model.save_adapter(tmp_path / "ours", "theirs", format="peft")
    again = peft.PeftModel.from_pretrained(bare("gpt2", "CAUSAL_LM"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, "gpt2"), logits(theirs, "gpt2"), rtol=1e-5, atol=1e-5)


def test_module_names_of_transformers_4(tmp_path) -> None:
    """A file that was made when ViT's modules had other names."""
    theirs = trained("vit", peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], **CLS))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    former = {"vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query"}
    former["mlp.fc1"] = "intermediate.dense"
    tensors = load_file(file)
    for now, then in former.items():
        tensors = {key.replace(now, then): tensor for key, tensor in tensors.items()}
    assert sum("vit.encoder.layer" in key for key in tensors) == 8
    save_file(tensors, file)
    model = ours("vit", "SEQ_CLS")
    model.load_adapter(tmp_path, load_as="x", set_active=True)
    torch.testing.assert_close(logits(model, "vit"), logits(theirs, "vit"), rtol=1e-5, atol=1e-5)


def test_a_repository_of_the_hub(tmp_path, monkeypatch) -> None:
    """It is named by the repository, not by the folder in the cache."""
    theirs = trained("bert", peft.LoraConfig(**QV))
    theirs.save_pretrained(tmp_path / "a1b2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path / "a1b2"))
    model = ours("bert", "SEQ_CLS")
    assert model.load_adapter("someone/bert-lora-v1.5", set_active=True) == "bert-lora-v1_5"
    torch.testing.assert_close(logits(model, "bert"), logits(theirs, "bert"), rtol=1e-5, atol=1e-5)


def test_files_of_bin_format_and_the_default_name(tmp_path) -> None:
    folder = tmp_path / "my.lora"
    theirs = trained("bert", peft.LoraConfig(**QV))
    theirs.save_pretrained(folder, safe_serialization=False)
    model = ours("bert", "SEQ_CLS")
    assert model.load_adapter(folder, set_active=True) == "my_lora"
    torch.testing.assert_close(logits(model, "bert"), logits(theirs, "bert"), rtol=1e-5, atol=1e-5)
    model.load_adapter(folder)  # over itself
    torch.testing.assert_close(logits(model, "bert"), logits(theirs, "bert"), rtol=1e-5, atol=1e-5)
    (native := tmp_path / "native").mkdir()
    model.save_adapter(native, "my_lora")
    again = ours("bert", "SEQ_CLS")
    again.load_adapter(native, set_active=True)
    torch.testing.assert_close(logits(again, "bert"), logits(theirs, "bert"), rtol=1e-5, atol=1e-5)
