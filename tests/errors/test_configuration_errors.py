"""What users see when a configuration is wrong."""

import re

import pytest

from adapters.configuration import (
    AdapterConfig,
    AdapterFusionConfig,
    AdapterPlusConfig,
    BnConfig,
    ConfigUnion,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ModelAdaptersConfig,
    MTLLoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    StaticAdapterFusionConfig,
    UniPELTConfig,
)
from adapters.errors import AdapterError, ConfigError, UnknownAdapterError


def raises(error, message):
    return pytest.raises(error, match=re.escape(message))


UNKNOWN_FIELD = "LoRAConfig: unknown field 'rr'; did you mean 'r'?"


@pytest.mark.parametrize(
    "call",
    [
        lambda: LoRAConfig(rr=4),
        lambda: LoRAConfig().replace(rr=4),
        lambda: LoRAConfig.from_dict({"rr": 4}),
        lambda: AdapterConfig.load("lora", rr=4),
        lambda: AdapterConfig.load("lora[rr=4]"),
        lambda: AdapterConfig.load({"architecture": "lora", "rr": 4}),
        lambda: AdapterConfig.load(LoRAConfig(), rr=4),
    ],
)
@pytest.mark.parametrize("kind", [ConfigError, TypeError, ValueError])
def test_unknown_field(call, kind):
    with raises(kind, UNKNOWN_FIELD):
        call()


@pytest.mark.parametrize(
    ("build", "field", "value", "right"),
    [
        (SeqBnConfig, "mh_adapter", "yes", "must be True or False"),
        (SeqBnConfig, "reduction_factor", 0, "must be a number > 0"),
        (SeqBnConfig, "reduction_factor", "16", "must be a number > 0"),
        (SeqBnConfig, "reduction_factor", True, "must be a number > 0"),
        (SeqBnConfig, "reduction_factor", float("nan"), "must be a number > 0"),
        (SeqBnConfig, "reduction_factor", {}, "number > 0 for each layer"),
        (SeqBnConfig, "reduction_factor", {"default": 0}, "number > 0 for each layer"),
        (SeqBnConfig, "reduction_factor", {"first": 2}, "number > 0 for each layer"),
        (SeqBnConfig, "reduction_factor", {0: 2, "0": 4}, "number > 0 for each layer"),
        (SeqBnConfig, "non_linearity", "geluu", "did you mean 'gelu'?"),
        (SeqBnConfig, "non_linearity", None, "known are"),
        (SeqBnConfig, "init_weights", "zeros", "one of 'bert', 'mam_adapter' and 'houlsby'"),
        (SeqBnConfig, "init_weights_seed", 1.5, "integer or None"),
        (SeqBnConfig, "init_weights_seed", True, "integer or None"),
        (SeqBnConfig, "scaling", "large", "a number, 'learned' or 'channel'"),
        (SeqBnConfig, "scaling", True, "a number, 'learned' or 'channel'"),
        (SeqBnConfig, "residual_before_ln", "pre", "True, False or 'post_add'"),
        (BnConfig, "residual_before_ln", "post_add", "original_ln_before=True"),
        (SeqBnConfig, "inv_adapter", "real", "one of 'nice' and 'glow' or None"),
        (SeqBnConfig, "inv_adapter_reduction_factor", 0, "must be a number > 0"),
        (SeqBnConfig, "leave_out", [-1], "list of integers >= 0"),
        (SeqBnConfig, "leave_out", ["0"], "list of integers >= 0"),
        (SeqBnConfig, "leave_out", 3, "list of integers >= 0"),
        (SeqBnConfig, "dropout", 1.0, "number in [0, 1)"),
        (SeqBnConfig, "dropout", -0.1, "number in [0, 1)"),
        (SeqBnConfig, "dropout", None, "number in [0, 1)"),
        (SeqBnConfig, "phm_dim", 0, "integer >= 1"),
        (SeqBnConfig, "phm_rank", 1.5, "integer >= 1"),
        (SeqBnConfig, "phm_c_init", "zero", "'normal' and 'uniform'"),
        (SeqBnConfig, "phm_init_range", 0, "number > 0"),
        (SeqBnConfig, "hypercomplex_nonlinearity", "relu", "'glorot-uniform'"),
        (AdapterPlusConfig, "stochastic_depth", 1, "number in [0, 1)"),
        (PrefixTuningConfig, "prefix_length", 0, "integer >= 1"),
        (PrefixTuningConfig, "bottleneck_size", 0, "integer >= 1"),
        (PrefixTuningConfig, "non_linearity", "tan", "did you mean 'tanh'?"),
        (PrefixTuningConfig, "architecture", "lora", "must be 'prefix_tuning'"),
        (PromptTuningConfig, "prompt_length", 0, "integer >= 1"),
        (PromptTuningConfig, "prompt_init", "zeros", "'random_uniform' and 'from_string'"),
        (PromptTuningConfig, "combine", "suffix", "'prefix' and 'prefix_after_bos'"),
        (PromptTuningConfig, "random_uniform_scale", 0, "number > 0"),
        (LoRAConfig, "r", 0, "integer >= 1"),
        (LoRAConfig, "r", 2.0, "integer >= 1"),
        (LoRAConfig, "alpha", "8", "must be a number"),
        (LoRAConfig, "attn_matrices", ["q", "x"], "some of 'q', 'k', 'v' and 'o'"),
        (LoRAConfig, "attn_matrices", None, "some of 'q', 'k', 'v' and 'o'"),
        (LoRAConfig, "composition_mode", "multiply", "'add' and 'scale'"),
        (LoRAConfig, "init_weights", "zeros", "'lora', 'bert', 'ia3', 'vera', 'pissa'"),
        (LoRAConfig, "vera_d", "0.1", "must be a number"),
        (LoRAConfig, "dtype", "int8", "'bfloat16' or None"),
        (IA3Config, "r", 2, "must be 1"),
        (IA3Config, "dropout", 0.1, "must be 0"),
        (IA3Config, "use_dora", True, "must be False"),
        (IA3Config, "init_weights", "vera", "must be 'ia3', 'bert' or 'lora'"),
        (MTLLoRAConfig, "n_up_projection", 0, "integer >= 1"),
        (MTLLoRAConfig, "task_specific_matrix_type", "full", "'singular_values' and 'linear'"),
        (MTLLoRAConfig, "weights_sharpness", 0, "number > 0"),
        (LoReftConfig, "layers", "some", "list of integers >= 0"),
        (LoReftConfig, "prefix_positions", -1, "integer >= 0"),
        (LoReftConfig, "suffix_positions", 1.5, "integer >= 0"),
        (LoReftConfig, "non_linearity", "sin", "no activation function"),
        (StaticAdapterFusionConfig, "dropout_prob", 2, "number in [0, 1)"),
        (StaticAdapterFusionConfig, "key", 1, "must be True or False"),
    ],
)
def test_value_that_no_method_accepts(build, field, value, right):
    required = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu"}
    with raises(ConfigError, f"{build.__name__}({field}={value!r}): ") as caught:
        build(**{**(required if build is BnConfig else {}), field: value})
    assert right in str(caught.value)


def test_fields_that_need_each_other():
    with raises(ConfigError, "prompt_init='from_string' needs a text"):
        PromptTuningConfig(prompt_init="from_string")
    with raises(ConfigError, "(inv_adapter_reduction_factor=None)"):
        SeqBnConfig(inv_adapter="nice")
    with raises(ConfigError, "(suffix_positions=0): 0 is too few, with prefix_positions=0; no position would change"):
        LoReftConfig(prefix_positions=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lora[r=1", "AdapterConfig.load('lora[r=1'): Invalid adapter config string format: 'lora[r=1'"),
        ("lora]", "Invalid adapter config string format"),
        ("|lora", "Invalid adapter config string format: ''"),
        ("lora[r=abc]", "Invalid adapter configuration 'r=abc'"),
        ("lora[8]", "Invalid adapter configuration '8'"),
        ("lora[r=1,r=2]", "Invalid adapter configuration"),
        ("lora[**{'r': 1}]", "Invalid adapter configuration"),
        ("lora[r=(lambda: 1)()]", "Invalid adapter configuration"),
        (
            "loar",
            "Could not identify 'loar' as a valid adapter configuration; no file has that name, did you",
        ),
        ("loar[r=1]", "Could not identify 'loar'"),
        ("x" * 5000, "Could not identify"),
        ("mam|lora", "a member is of type MAMConfig"),
        ({"architecture": "lorra"}, "unknown architecture 'lorra'; did you mean 'lora'?"),
        (
            {"mh_adapter": True},
            "the fields 'output_adapter', 'reduction_factor' and 'non_linearity' are missing",
        ),
        ({"architecture": "union"}, "ConfigUnion: the field 'configs' is None; it must be a list"),
        ({"architecture": "union", "configs": [3]}, "AdapterConfig.load(3): it is of type int"),
        ({"architecture": "union", "configs": [], "config": []}, "unknown field 'config'; did you mean 'configs'?"),
        (3, "AdapterConfig.load(3): it is of type int"),
    ],
)
def test_what_load_cannot_read(config, message):
    with raises(ConfigError, message):
        AdapterConfig.load(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the file is not JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"config": null}', "must hold a JSON object"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with raises(ConfigError, message):
        AdapterConfig.load(str(path))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConfigUnion("lora"), "a member is of type str"),
        (lambda: ConfigUnion(MAMConfig()), "a member is of type MAMConfig"),
        (lambda: ConfigUnion(LoRAConfig(), IA3Config()), "ConfigUnion(LoRAConfig, IA3Config): both would sit"),
        (lambda: ConfigUnion(SeqBnConfig(), ParBnConfig()), "both would sit in the same places"),
        (lambda: MAMConfig(LoRAConfig()), "MAMConfig: prefix_tuning is a LoRAConfig; it must be a PrefixTuningConfig"),
        (lambda: UniPELTConfig(lora=SeqBnConfig()), "UniPELTConfig: lora is a SeqBnConfig"),
        (lambda: AdapterConfig.load("mam", reduction_facto=2), "did you mean 'reduction_factor'?"),
    ],
)
def test_unions_that_cannot_be(call, message):
    with raises(ConfigError, message):
        call()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("statik", "Invalid AdapterFusion config identifier 'statik'; did you mean 'static'?"),
        (LoRAConfig(), "AdapterFusionConfig.load(LoRAConfig): it configures an adapter"),
        ({"key": True}, "AdapterFusionConfig: the fields 'query'"),
        ({**StaticAdapterFusionConfig(), "keys": True}, "unknown field 'keys'; did you mean 'key'?"),
    ],
)
def test_fusions_that_cannot_be(config, message):
    with raises(ConfigError, message):
        AdapterFusionConfig.load(config)


@pytest.fixture
def record():
    made = ModelAdaptersConfig()
    made.add("a", "seq_bn")
    made.add("b", "double_seq_bn")
    made.add_fusion(["a", "b"])
    return made


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.add("a"), AdapterError, "An adapter with the name 'a' has already been added"),
        (lambda r: r.add("x.y"), AdapterError, "add_adapter('x.y'): 'x.y' cannot be the name of a module"),
        (lambda r: r.add(""), AdapterError, "cannot be the name of a module"),
        (lambda r: r.add(3), AdapterError, "add_adapter(3): 3 cannot be the name of a module"),
        (lambda r: r.add("c", "loar"), ConfigError, "did you mean 'lora'?"),
        (lambda r: r.add("c", {}), ConfigError, "add_adapter('c'): the configuration {} is empty"),
        (lambda r: r.remove("c"), UnknownAdapterError, "No adapter with name 'c' found; the model has 'a' and 'b'"),
        (lambda r: r.members("c"), UnknownAdapterError, "No adapter with name 'c' found"),
        (lambda r: r.add_fusion(["a", "c"]), UnknownAdapterError, "No adapter with name 'c' found"),
        (
            lambda r: r.add_fusion(["a", "b"]),
            AdapterError,
            "An AdapterFusion with the name 'a,b' has already been added",
        ),
        (lambda r: r.add_fusion(["b", "a"], "none"), ConfigError, "Invalid AdapterFusion config identifier 'none'"),
        (lambda r: r.add_fusion(["b", "a"], None, "x.y"), AdapterError, "add_adapter_fusion('x.y')"),
        (lambda r: r.remove_fusion("b,a"), UnknownAdapterError, "no fusion named 'b,a'; it has 'a,b'"),
        (
            lambda r: r.common_config_value(["a", "b"], "mh_adapter"),
            AdapterError,
            "must define the same value for config attribute mh_adapter; 'a' has False, 'b' has True.",
        ),
    ],
)
def test_record_refuses_and_stays_as_it_was(record, call, error, message):
    before = record.to_dict()
    with raises(error, message):
        call(record)
    assert record.to_dict() == before


def test_members_that_meet(record):
    record.add("two", ConfigUnion(LoRAConfig(leave_out=[0]), LoRAConfig()))
    with raises(ValueError, "Multiple adapter definitions conflict for adapter 'two' in layer 1"):
        record.match("two", LoRAConfig, 1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"adapters": {"a": "lost"}}, "adapter 'a': its configuration 'lost' is missing"),
        (
            {"fusions": {"a,b": "dynamik"}},
            "fusion 'a,b': its configuration 'dynamik' is missing; did you mean",
        ),
    ],
)
def test_record_with_a_hole(entries, message):
    with raises(ConfigError, message):
        ModelAdaptersConfig(**entries)
