"""Configurations: laws over every preset, what identifiers, strings and files give, and the record of a model."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import pytest

from adapters.configuration import (
    ADAPTER_CONFIG_MAP,
    ADAPTERFUSION_CONFIG_MAP,
    DEFAULT_ADAPTER_CONFIG,
    DEFAULT_ADAPTERFUSION_CONFIG,
    AdapterConfig,
    AdapterFusionConfig,
    AdapterPlusConfig,
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DiReftConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    DoubleSeqBnInvConfig,
    DvoRAConfig,
    DynamicAdapterFusionConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ModelAdaptersConfig,
    MTLLoRAConfig,
    MultiTaskConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    StaticAdapterFusionConfig,
    UniPELTConfig,
    VeraConfig,
    get_adapter_config_hash,
    parse_adapter_config_string,
    resolve_adapter_config,
)

# identifier, class, hash of 1.3.0
PRESETS = [
    ("seq_bn", SeqBnConfig, "9076f36a74755ac4"),
    ("double_seq_bn", DoubleSeqBnConfig, "b1017368d7a97b11"),
    ("par_bn", ParBnConfig, "211b85d66ae909db"),
    ("scaled_par_bn", ParBnConfig, "4197b24ec21c92f8"),
    ("seq_bn_inv", SeqBnInvConfig, "9ed5b5a29de19b71"),
    ("double_seq_bn_inv", DoubleSeqBnInvConfig, "bcdbfdc759d7abf1"),
    ("compacter", CompacterConfig, "934efc0c1022a56f"),
    ("compacter++", CompacterPlusPlusConfig, "cfa13994accfb5f4"),
    ("prefix_tuning", PrefixTuningConfig, "648bf22f5afeaaa6"),
    ("prefix_tuning_flat", PrefixTuningConfig, "d61d9a6e9c3974ea"),
    ("prompt_tuning", PromptTuningConfig, "8e35d5049bb12364"),
    ("lora", LoRAConfig, "625403edad0bf919"),
    ("ia3", IA3Config, "1ebb5af107e576c0"),
    ("vera", VeraConfig, "2be4e8738bf1b672"),
    ("dora", DoRAConfig, "045575c920686296"),
    ("dvora", DvoRAConfig, "54bac59257d09af0"),
    ("mtl_lora", MTLLoRAConfig, "b37172df6259ff89"),
    ("loreft", LoReftConfig, "141e29e6c21f7261"),
    ("noreft", NoReftConfig, "df69f184fdb72464"),
    ("direft", DiReftConfig, "df69f184fdb72464"),
    ("mam", MAMConfig, "97453c0dbc2dbc97"),
    ("unipelt", UniPELTConfig, "67ac4937c601ad56"),
]
ALIASES = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
    "pfeiffer+inv": "seq_bn_inv",
    "houlsby+inv": "double_seq_bn_inv",
}
RECOVERED = {name: preset for name, preset, _ in PRESETS if issubclass(preset, LoRAConfig | ReftConfig)}
FIELDS = {
    BnConfig: "mh_adapter output_adapter reduction_factor non_linearity original_ln_before original_ln_after ln_before "
    "ln_after init_weights init_weights_seed is_parallel scaling use_gating residual_before_ln "
    "adapter_residual_before_ln inv_adapter inv_adapter_reduction_factor cross_adapter leave_out dropout phm_layer "
    "phm_dim factorized_phm_W shared_W_phm shared_phm_rule factorized_phm_rule phm_c_init phm_init_range learn_phm "
    "hypercomplex_nonlinearity phm_rank phm_bias stochastic_depth",
    PrefixTuningConfig: "architecture encoder_prefix cross_prefix leave_out flat prefix_length bottleneck_size "
    "non_linearity dropout use_gating shared_gating init_weights_seed shift_positions",
    PromptTuningConfig: "architecture prompt_length prompt_init prompt_init_text combine init_weights_seed "
    "random_uniform_scale placement tokenizer_name_or_path",
    LoRAConfig: "architecture selfattn_lora intermediate_lora output_lora leave_out r alpha dropout attn_matrices "
    "composition_mode init_weights init_weights_seed use_gating use_dora vera_d vera_b dtype "
    "use_rslora rank_pattern alpha_pattern lora_bias embedding_lora lm_head_lora legacy target_modules scaled_inputs",
    MTLLoRAConfig: "architecture selfattn_lora intermediate_lora output_lora leave_out r alpha dropout attn_matrices "
    "composition_mode init_weights init_weights_seed use_gating use_dora vera_d vera_b dtype "
    "use_rslora rank_pattern alpha_pattern lora_bias embedding_lora lm_head_lora legacy target_modules scaled_inputs "
    "n_up_projection task_specific_matrix_type weights_sharpness",
    ReftConfig: "layers prefix_positions suffix_positions r orthogonality tied_weights dropout non_linearity dtype "
    "architecture output_reft init_weights_seed subtract_projection leave_out",
    AdapterFusionConfig: "key query value query_before_ln regularization residual_before temperature "
    "value_before_softmax value_initialized dropout_prob",
}

PREFIX_AND_PARALLEL = ConfigUnion(PrefixTuningConfig(), ParBnConfig(reduction_factor=4))

each_config = pytest.mark.parametrize(
    "config", [*ADAPTER_CONFIG_MAP.values(), *ADAPTERFUSION_CONFIG_MAP.values()], ids=lambda c: type(c).__name__
)


@pytest.mark.parametrize(("name", "preset", "hash_of_1x"), PRESETS)
def test_identifier_gives_its_class_and_the_hash_of_1x(name, preset, hash_of_1x):
    config = AdapterConfig.load(name)
    assert type(config) is preset
    assert get_adapter_config_hash(config) == hash_of_1x


BEYOND_1X = {
    *("adalora", "bitfit", "boft", "bone", "cpt", "fourierft", "hira", "hra", "ln_tuning", "loha", "lokr", "miss"),
    *(
        "multitask_prompt_tuning",
        "oft",
        "p_tuning",
        "randlora",
        "road",
        "router",
        "shira",
        "trainable_tokens",
        "vblora",
    ),
}


def test_identifiers_and_aliases_are_complete():
    of_1x = {name for name, *_ in PRESETS} | set(ALIASES) | {"adapter_plus"}
    assert set(ADAPTER_CONFIG_MAP) == of_1x | BEYOND_1X
    for alias, name in ALIASES.items():
        assert ADAPTER_CONFIG_MAP[alias] is ADAPTER_CONFIG_MAP[name]
    assert type(ADAPTER_CONFIG_MAP["adapter_plus"]) is AdapterPlusConfig
    assert DEFAULT_ADAPTER_CONFIG == "seq_bn"
    assert DEFAULT_ADAPTERFUSION_CONFIG == "dynamic"
    assert get_adapter_config_hash(ADAPTERFUSION_CONFIG_MAP["dynamic"]) == "39f0b9fc022449eb"


@pytest.mark.parametrize(("config_class", "fields"), FIELDS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_fields_keep_their_order(config_class, fields):
    later = "modules shared_experts router_lora" if issubclass(config_class, LoRAConfig) else "modules"
    assert config_class.field_names() == (*fields.split(), *later.split())
    assert all(field.kw_only for field in dataclasses.fields(config_class) if field.name in later.split())


@each_config
def test_json_round_trip_gives_an_equal_config(config):
    rebuilt = type(config).load(json.loads(json.dumps(config.to_dict())))
    assert rebuilt == config
    assert hash(rebuilt) == hash(config)
    assert rebuilt.to_dict() == config.to_dict()


@pytest.mark.parametrize(("name", "preset"), RECOVERED.items())
def test_json_keeps_presets_that_fields_tell(name, preset):
    assert type(AdapterConfig.load(ADAPTER_CONFIG_MAP[name].to_dict())) is preset


def test_a_partial_dictionary_has_the_defaults_of_the_method_not_of_a_preset():
    config = AdapterConfig.load({"architecture": "lora", "vera_d": 0.1})
    assert type(config) is VeraConfig
    assert config == LoRAConfig(vera_d=0.1)
    assert config.init_weights == "lora"


@each_config
def test_copies_are_equal_and_of_the_same_class(config):
    for other in (
        config.replace(),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        type(config).load(config),
    ):
        assert other is not config
        assert other == config
        assert hash(other) == hash(config)
    assert type(config.replace()) is type(config) is type(copy.deepcopy(config))


@each_config
def test_a_config_does_not_change(config):
    before = config.to_dict()
    for name in ("non_linearity", "r", "configs", "custom"):
        with pytest.raises(FrozenInstanceError, match=f"{name}.*config.replace"):
            setattr(config, name, "x")
    with pytest.raises(FrozenInstanceError):
        del config.use_gating
    with pytest.raises(TypeError):
        config["r"] = 3
    assert config.to_dict() == before


@each_config
def test_mapping_view_has_the_fields(config):
    assert isinstance(config, Mapping)
    assert len(config) == len(list(config)) == len(dict(config))
    assert all(config[key] == value for key, value in config.items())
    assert config.get("nothing") is None
    assert "nothing" not in config


@pytest.mark.parametrize("abstract", [AdapterConfig, MultiTaskConfig])
def test_the_bases_are_abstract(abstract):
    with pytest.raises(TypeError, match="abstract"):
        abstract()


def test_equality_is_that_of_the_fields():
    assert LoRAConfig() == DoRAConfig(use_dora=False)
    assert hash(LoRAConfig()) == hash(DoRAConfig(use_dora=False))
    assert LoRAConfig() != LoRAConfig(r=4)
    assert NoReftConfig() != DiReftConfig()
    assert DoubleSeqBnConfig(non_linearity="gelu", reduction_factor=32) != CompacterConfig()
    assert LoRAConfig() != LoRAConfig().to_dict()
    assert hash(SeqBnConfig(reduction_factor=16.0)) == hash(SeqBnConfig())


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (SeqBnConfig(scaling=4), "scaling", 4.0),
        (VeraConfig(vera_d=1, vera_b=0), "vera_b", 0.0),
        (
            SeqBnConfig(reduction_factor={0: 4, "1": 8, "default": 16}),
            "reduction_factor",
            {"0": 4, "1": 8, "default": 16},
        ),
        (LoRAConfig(leave_out=range(2)), "leave_out", [0, 1]),
        (LoRAConfig(attn_matrices="qo"), "attn_matrices", ["q", "o"]),
        (SeqBnConfig(stochastic_depth=None), "stochastic_depth", 0.0),
        (LoRAConfig(init_weights_seed=0), "init_weights_seed", 0),
        (PromptTuningConfig(random_uniform_scale=0.1), "random_uniform_scale", 0.1),
        (LoReftConfig(layers=(0, 2)), "layers", [0, 2]),
        (SeqBnConfig(non_linearity="leakyrelu"), "non_linearity", "leakyrelu"),
        (SeqBnConfig(non_linearity="GELU"), "non_linearity", "GELU"),
    ],
)
def test_values_have_one_form(config, field, value):
    assert config[field] == value
    assert type(config[field]) is type(value)
    assert AdapterConfig.load(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_does_not_hold_the_lists_of_the_caller():
    layers, factors = [0], {"default": 4}
    config = SeqBnConfig(leave_out=layers, reduction_factor=factors)
    layers.append(1)
    factors["0"] = 2
    config.to_dict()["leave_out"].append(2)
    assert config == SeqBnConfig(leave_out=[0], reduction_factor={"default": 4})


def test_load_changes_fields_and_not_the_dictionary_of_the_caller():
    values = SeqBnConfig().to_dict()
    before = copy.deepcopy(values)
    loaded = AdapterConfig.load(values, {"force_download": True}, reduction_factor=4, dropout=None, leave_out=[1])
    assert loaded == SeqBnConfig(reduction_factor=4, leave_out=[1])
    assert values == before


@pytest.mark.parametrize("nothing", [None, "", {}])
def test_load_of_nothing_is_none(nothing):
    assert AdapterConfig.load(nothing) is None


@pytest.mark.parametrize("architecture", [None, "bottleneck"])
def test_the_architecture_of_a_bottleneck_may_be_named(architecture):
    assert AdapterConfig.load({"architecture": architecture, **SeqBnConfig().to_dict()}) == SeqBnConfig()


@pytest.mark.parametrize(
    "wrap", [lambda config: config, lambda config: {"config": config, "version": "adapters.1.3.0"}]
)
def test_load_reads_files(tmp_path, wrap):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(wrap(IA3Config().to_dict())))
    assert AdapterConfig.load(str(path), leave_out=[3]) == IA3Config(leave_out=[3])


def test_changes_of_a_dictionary_are_made_before_it_is_checked():
    assert AdapterConfig.load({"architecture": "lora", "composition_mode": "scale"}, r=1).r == 1
    assert type(AdapterConfig.load(IA3Config().to_dict(), composition_mode="add")) is LoRAConfig


@pytest.mark.parametrize(
    ("string", "expected"),
    [
        ("lora[r=16,alpha=32]", LoRAConfig(r=16, alpha=32)),
        (" lora [ r = 16 , ] ", LoRAConfig(r=16)),
        ("lora[]", LoRAConfig()),
        ("seq_bn[non_linearity='gelu',leave_out=[0,1]]", SeqBnConfig(non_linearity="gelu", leave_out=[0, 1])),
        (
            "seq_bn[reduction_factor={'default':16,'1':8}]",
            SeqBnConfig(reduction_factor={"default": 16, "1": 8}),
        ),
        ("prompt_tuning[prompt_init_text='a=1, b=[2]']", PromptTuningConfig(prompt_init_text="a=1, b=[2]")),
        (
            "prefix_tuning | par_bn[reduction_factor=4]",
            ConfigUnion(PrefixTuningConfig(), ParBnConfig(reduction_factor=4)),
        ),
        (
            "mam[use_gating=True]",
            ConfigUnion(PrefixTuningConfig(bottleneck_size=800, use_gating=True), ParBnConfig(use_gating=True)),
        ),
    ],
)
def test_config_strings(string, expected):
    assert parse_adapter_config_string(string) == expected
    assert AdapterConfig.load(string) == expected


def test_resolve_gives_the_fields():
    assert resolve_adapter_config({"r": 3}) == {"r": 3}
    assert resolve_adapter_config("mine", {"mine": {"r": 3}}) == {"r": 3}
    assert resolve_adapter_config("lora[r=3]") == LoRAConfig(r=3)


def test_hash_ignores_parameters_and_has_a_length():
    assert get_adapter_config_hash(LoRAConfig(r=4), ignore_params=["r"]) == get_adapter_config_hash(
        LoRAConfig(), ignore_params=["r"]
    )
    assert len(get_adapter_config_hash(LoRAConfig(), length=8)) == 8


# Unions


def test_union_reads_members_and_their_fields():
    union = ConfigUnion(PrefixTuningConfig(), LoRAConfig(r=2))
    assert union[0] == PrefixTuningConfig()
    assert union["1.r"] == 2
    assert union["architecture"] == "union"
    assert "1.r" in list(union)
    assert len(union) == len(PrefixTuningConfig()) + len(LoRAConfig())
    assert union.get("x") is union.get("7.r") is union.get("1.x") is None


def test_union_equality_counts_members():
    assert ConfigUnion(LoRAConfig(), ParBnConfig()) != ConfigUnion(LoRAConfig())
    assert ConfigUnion(PrefixTuningConfig(bottleneck_size=800), ParBnConfig()) == MAMConfig()


def test_changes_reach_the_members_that_have_the_field():
    union = AdapterConfig.load("mam", reduction_factor=8, use_gating=True)
    assert isinstance(union, MAMConfig)
    assert union.adapter == ParBnConfig(reduction_factor=8, use_gating=True)
    assert union.prefix_tuning.use_gating is True
    assert ConfigUnion.from_dict({"configs": [LoRAConfig(), ParBnConfig().to_dict()]}).replace(r=2)["0.r"] == 2
    assert UniPELTConfig().replace(use_gating=False)["2.use_gating"] is False


@pytest.mark.parametrize(
    "members",
    [
        (LoRAConfig(leave_out=[0]), LoRAConfig(leave_out=[1])),
        (SeqBnConfig(), SeqBnConfig(leave_out=[1])),
        (BnConfig(True, False, 4, "relu"), BnConfig(False, True, 8, "relu")),
    ],
)
def test_members_of_one_method_may_share_a_union_if_they_do_not_meet(members):
    assert ConfigUnion(*members).configs == members


def test_presets_of_unions():
    prefix, adapter, lora = UniPELTConfig(lora=LoRAConfig(r=2)).configs
    assert prefix == PrefixTuningConfig(prefix_length=10, use_gating=True)
    assert adapter == SeqBnConfig(use_gating=True)
    assert lora == LoRAConfig(r=2, use_gating=True)


# Fusions


def test_fusion_load():
    assert type(AdapterFusionConfig.load("static")) is AdapterFusionConfig
    assert AdapterFusionConfig.load("static") == StaticAdapterFusionConfig()
    assert AdapterFusionConfig.load(None, value=None) == DynamicAdapterFusionConfig()
    assert AdapterFusionConfig.load("static", dropout_prob=0).dropout_prob == 0.0
    assert AdapterFusionConfig.load("static", dropout_prob=0) != StaticAdapterFusionConfig()


# The record of a model


def test_record_is_the_collection_of_its_adapters():
    record = ModelAdaptersConfig()
    record.add("a")
    record.add("b", "lora")
    record.add("c", LoRAConfig(r=2))
    record.add("d", "lora[r=2]")
    assert list(record) == ["a", "b", "c", "d"]
    assert len(record) == 4
    assert "c" in record
    assert "x" not in record
    assert record.get("x") is None
    assert record.adapters["a"] == "seq_bn"
    assert record.adapters["b"] == "lora"
    assert record.adapters["c"] == record.adapters["d"] == get_adapter_config_hash(LoRAConfig(r=2))
    assert record.get("a") == SeqBnConfig()
    assert record.get("d").r == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (DoubleSeqBnConfig(reduction_factor=32, non_linearity="gelu"), CompacterConfig()),
        (NoReftConfig(), DiReftConfig()),
        (LoRAConfig(vera_b=0.0), LoRAConfig()),
        (LoRAConfig(init_weights_seed=0), LoRAConfig()),
    ],
)
def test_configs_with_one_hash_do_not_replace_each_other(first, second):
    assert get_adapter_config_hash(first) == get_adapter_config_hash(second)
    record = ModelAdaptersConfig()
    for name, config in {"a": first, "b": second, "c": first, "d": second}.items():
        record.add(name, config)
    record = ModelAdaptersConfig(**json.loads(json.dumps(record.to_dict())))
    assert [record.get(name) for name in "abcd"] == [first, second, first, second]
    assert len(record.config_map) == 2
    for name in "abd":
        record.remove(name)
    assert record.get("c") == first
    assert len(record.config_map) == 1


def test_a_key_may_be_free_while_its_configs_come_and_go():
    record = ModelAdaptersConfig()
    record.add("a", NoReftConfig())
    record.add("b", DiReftConfig())
    record.remove("a")
    record.add("c", DiReftConfig())
    record.add("d", NoReftConfig())
    assert [record.get(name) for name in "bcd"] == [DiReftConfig(), DiReftConfig(), NoReftConfig()]


def test_remove_leaves_nothing():
    record = ModelAdaptersConfig()
    before = record.to_dict()
    record.add("a", "lora[r=2]")
    record.add("b", LoRAConfig(r=2))
    record.add_fusion(["a", "b"], {**StaticAdapterFusionConfig(), "dropout_prob": 0.5}, "mix")
    record.remove_fusion("mix")
    record.remove("a")
    assert record.get("b") == LoRAConfig(r=2)
    record.remove("b")
    assert record.to_dict() == before


def test_record_of_fusions():
    record = ModelAdaptersConfig()
    for name in "abc":
        record.add(name)
    record.add_fusion(["a", "b"])
    record.add_fusion("b,c", "static")
    record.add_fusion(["a", "c"], {**DynamicAdapterFusionConfig(), "dropout_prob": 0.0}, fusion_name="zero")
    record.add_fusion(["a", "b", "c"], DynamicAdapterFusionConfig(), fusion_name="all")
    record = ModelAdaptersConfig(**json.loads(json.dumps(record.to_dict())))
    assert record.get_fusion("a,b") == record.get_fusion(["a", "b"]) == (DynamicAdapterFusionConfig(), ["a", "b"])
    assert record.get_fusion(["b", "c"])[0] == StaticAdapterFusionConfig()
    assert record.get_fusion("zero")[0].dropout_prob == 0.0
    assert record.get_fusion("all") == (DynamicAdapterFusionConfig(), ["a", "b", "c"])
    assert record.get_fusion("none") == (None, None)
    assert record.fusions["a,b"] == "dynamic"
    assert record.fusion_name_map == {"zero": ["a", "c"], "all": ["a", "b", "c"]}


def test_record_reads_the_pairs_of_the_first_releases():
    record = ModelAdaptersConfig(
        adapters={"a": ("text_task", "pfeiffer"), "b": ["houlsby", None], "c": ["text_lang", "x"]},
        config_map={"x": "ia3"},
    )
    assert [record.get(name) for name in "abc"] == [SeqBnConfig(), DoubleSeqBnConfig(), IA3Config()]


def test_members_and_match():
    record = ModelAdaptersConfig()
    record.add("mam", "mam")
    record.add("lora", LoRAConfig(leave_out=[1]))
    first, second = LoRAConfig(leave_out=[0]), LoRAConfig(leave_out=[1])
    record.add("two", ConfigUnion(first, second))
    assert record.members("mam") == (PrefixTuningConfig(bottleneck_size=800), ParBnConfig())
    assert record.members("lora") == (LoRAConfig(leave_out=[1]),)
    assert record.match("mam", BnConfig, 0, "output_adapter") == ParBnConfig()
    assert record.match("mam", BnConfig, 0, "mh_adapter") is None
    assert record.match("lora", LoRAConfig, 0, "selfattn_lora") == LoRAConfig(leave_out=[1])
    assert record.match("lora", LoRAConfig, 1, "selfattn_lora") is None
    assert record.match("lora", BnConfig) is record.match("nothing", LoRAConfig) is None
    assert record.match("two", LoRAConfig, 1) == first
    assert record.match("two", LoRAConfig, 0) == second


def test_common_config_value():
    record = ModelAdaptersConfig()
    record.add("a", "seq_bn")
    record.add("b", "mam")
    assert record.common_config_value(["a", "b"], "output_adapter") is True
    assert record.common_config_value(["a", "b"], "mh_adapter") is False


def test_a_copy_of_a_record_is_its_own():
    record = ModelAdaptersConfig()
    record.add("a")
    other = copy.deepcopy(record)
    other.add("b", "lora[r=2]")
    assert list(record) == ["a"]
    assert record.config_map == {}


# Imports


def test_the_bases_need_no_torch():
    modules = ["base", "checks", "files", "hashing", "registry", "union", "adapter_config"]
    code = "import sys\n" + "".join(f"import adapters.configuration.{name}\n" for name in modules)
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


def test_every_name_is_at_both_places():
    from adapters import configuration
    from adapters.configuration import adapter_config

    assert set(configuration.__all__) <= set(dir(configuration)) & set(dir(adapter_config))
    for name in configuration.__all__:
        assert getattr(configuration, name) is getattr(adapter_config, name)
