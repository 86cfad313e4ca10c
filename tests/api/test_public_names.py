"""The names that scripts for 1.x import and call: each is there, or docs/migrating.md says what to use."""

import importlib
import inspect
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import adapters

MIGRATING = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")
NAMES = {
    "adapters": """
        init init_adapters_config load_model parse_composition validate_composition setup_adapter_training
        get_adapter_config_hash get_adapter_info list_adapters ADAPTER_CONFIG_MAP DEFAULT_ADAPTER_CONFIG
        ADAPTERFUSION_CONFIG_MAP DEFAULT_ADAPTERFUSION_CONFIG ADAPTER_MODEL_MAPPING ADAPTER_CACHE AlbertAdapterModel
        BartAdapterModel MBartAdapterModel PLBartAdapterModel BeitAdapterModel BertAdapterModel
        BertGenerationAdapterModel CLIPAdapterModel DebertaAdapterModel DebertaV2AdapterModel DistilBertAdapterModel
        ElectraAdapterModel GPT2AdapterModel GPTJAdapterModel LlamaAdapterModel MistralAdapterModel MT5AdapterModel
        T5AdapterModel RobertaAdapterModel XLMRobertaAdapterModel XmodAdapterModel ViTAdapterModel WhisperAdapterModel
        AutoAdapterModel ModelAdaptersMixin ModelWithHeadsAdaptersMixin ModelWithFlexibleHeadsAdaptersMixin
        EmbeddingAdaptersMixin InvertibleAdaptersMixin InvertibleAdaptersWrapperMixin AdapterLayerBase
        ComposableAdapterLayerBase AdapterCompositionBlock Stack Fuse Split BatchSplit Parallel MultiTask AdapterSetup
        ForwardContext PredictionHead ClassificationHead MultiLabelClassificationHead MultipleChoiceHead TaggingHead
        QuestionAnsweringHead BiaffineParsingHead BertStyleMaskedLMHead CausalLMHead Seq2SeqLMHead MultiHeadOutput
        DependencyParsingOutput AdapterMethod AdapterModelInterface AdapterArguments AdapterTrainer
        Seq2SeqAdapterTrainer AdapterType AdapterInfo AdapterConfig BnConfig SeqBnConfig SeqBnInvConfig
        DoubleSeqBnConfig DoubleSeqBnInvConfig ParBnConfig AdapterPlusConfig CompacterConfig CompacterPlusPlusConfig
        PrefixTuningConfig PromptTuningConfig LoRAConfig IA3Config VeraConfig DoRAConfig DvoRAConfig MultiTaskConfig
        MTLLoRAConfig ReftConfig LoReftConfig NoReftConfig DiReftConfig ConfigUnion MAMConfig UniPELTConfig
        AdapterFusionConfig StaticAdapterFusionConfig DynamicAdapterFusionConfig ModelAdaptersConfig __version__""",
    "adapters.composition": """
        Stack Fuse Split BatchSplit Parallel Average MultiTask ALLOWED_NESTINGS SUPPORTED_MODELS parse_composition
        validate_composition parse_heads_from_composition adjust_tensors_for_parallel adjust_tensors_for_parallel_
        match_attn_matrices_for_parallel""",
    "adapters.heads": "ImageClassificationHead Biaffine DependencyParsingOutput MultiHeadOutput CausalLMHead",
    "adapters.heads.language_modeling": "CausalLMHead Seq2SeqLMHead BertStyleMaskedLMHead",
    "adapters.context": "AdapterSetup ForwardContext",
    "adapters.interface": "AdapterMethod AdapterModelInterface",
    "adapters.wrappers": "init load_model init_adapters_config",
    "adapters.trainer": "AdapterTrainer Seq2SeqAdapterTrainer AdapterTrainerCallback logger",
    "adapters.training": "AdapterArguments setup_adapter_training",
    "adapters.configuration": "resolve_adapter_config LoRAConfig ModelAdaptersConfig",
    "adapters.configuration.adapter_config": "LoRAConfig BnConfig ConfigUnion",
    "adapters.loading": """
        WeightsLoader WeightsLoaderHelper AdapterLoader AdapterFusionLoader PredictionHeadLoader""",
    "adapters.model_mixin": """
        ModelAdaptersMixin ModelBaseAdaptersMixin ModelUsingSubmodelsAdaptersMixin EmbeddingAdaptersWrapperMixin
        ModelWithHeadsAdaptersMixin""",
    "adapters.hub_mixin": "PushAdapterToHubMixin",
    "adapters.head_utils": "STATIC_TO_FLEX_HEAD_MAP get_head_config_and_rename_list",
    "adapters.models.auto": "AutoAdapterModel ADAPTER_MODEL_MAPPING",
    "adapters.models.bert": "BertAdapterModel",
    "adapters.methods": "METHOD_INIT_MAPPING",
    "adapters.methods.lora": "LoRA LoRALayer LoRALinear LoRALinearTorch LoRAMergedLinear LoRAState",
    "adapters.methods.modeling": "Adapter ParallelAdapter BertFusion NICECouplingBlock PHMLayer",
    "adapters.utils": """
        CONFIG_NAME WEIGHTS_NAME SAFE_WEIGHTS_NAME HEAD_CONFIG_NAME HEAD_WEIGHTS_NAME SAFE_HEAD_WEIGHTS_NAME
        ADAPTERFUSION_CONFIG_NAME ADAPTERFUSION_WEIGHTS_NAME SAFE_ADAPTERFUSION_WEIGHTS_NAME EMBEDDING_FILE
        TOKENIZER_PATH SETUP_CONFIG_NAME INTERFACE_CONFIG_NAME AdapterType AdapterInfo ACTIVATION_RENAME
        get_adapter_config_hash resolve_adapter_config parse_adapter_config_string
        resolve_adapter_path find_in_index""",
}
METHODS = """
    add_adapter delete_adapter set_active_adapters active_adapters has_adapters has_parallel_adapters model_name
    supports_adapter add_adapter_fusion delete_adapter_fusion share_parameters unshare_parameters iter_layers
    apply_to_adapter_layers apply_to_basemodel_childs get_adapter adapter_to adapter_fusion_to eject_prefix_tuning
    adapter_summary freeze_model train_adapter train_adapter_fusion freeze_embeddings get_fusion_regularization_loss
    average_adapter merge_adapter reset_adapter save_adapter load_adapter save_all_adapters save_adapter_fusion
    load_adapter_fusion save_all_adapter_fusions save_adapter_setup load_adapter_setup loaded_embeddings
    active_embeddings add_embeddings set_active_embeddings delete_embeddings save_embeddings load_embeddings
    add_invertible_adapter delete_invertible_adapter get_invertible_adapter enable_invertible_adapters
    invertible_adapters_forward get_layer iter_attentions iter_layer_ffns push_adapter_to_hub
    push_adapter_setup_to_hub init_adapters model_frozen adapter_interface"""


def missing(module, names):
    try:
        found = importlib.import_module(module)
    except ImportError:
        return {module}
    return {name for name in names if not there(found, name)}


def there(module, name):
    try:
        getattr(module, name)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("module", NAMES)
def test_the_names_that_scripts_import(module):
    """A name that is not there stands in docs/migrating.md, with what to use."""
    unlisted = {name for name in missing(module, NAMES[module].split()) if f"`{name}`" not in MIGRATING}
    assert unlisted == set()


@pytest.mark.parametrize("name", METHODS.split())
def test_the_members_of_a_model(name):
    assert name in dir(adapters.ModelAdaptersMixin)


def test_1x_signatures():
    signature = inspect.signature(adapters.init)
    assert list(signature.parameters) == ["model", "adapters_config", "interface"]
    signature = inspect.signature(adapters.load_model)
    assert list(signature.parameters)[:3] == ["model_name_or_path", "model_class", "interface"]


def test_walks():
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24))
    adapters.init(model)
    model.add_adapter("a", "seq_bn_inv")
    layers = list(model.encoder.layer)
    assert list(model.iter_layers()) == list(enumerate(layers)) and model.get_layer(1) is layers[1]
    assert list(model.iter_attentions()) == [(i, "self", layer.attention.self) for i, layer in enumerate(layers)]
    maps = [
        (i, role, getattr(layer, role).dense) for i, layer in enumerate(layers) for role in ("intermediate", "output")
    ]
    assert list(model.iter_layer_ffns()) == maps
    seen = []
    model.apply_to_adapter_layers(lambda i, site: seen.append((i, list(site.adapters))))
    model.apply_to_basemodel_childs(lambda i, site: seen.append((i, site.location)))
    assert seen == [(0, ["a"]), (1, ["a"]), (-1, "invertible")]
    with pytest.raises(adapters.AdapterError, match=r"get_layer\(7\): the layers are 0 to 1"):
        model.get_layer(7)


def test_supports_adapter_changes_nothing():
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24))
    adapters.init(model)
    before = set(model.state_dict())
    for name in ("bottleneck", "lora", "reft", "prefix_tuning", "prompt_tuning", "invertible"):
        assert model.supports_adapter(name)
    assert model.supports_adapter(adapters.SeqBnConfig(cross_adapter=True))
    assert not model.supports_adapter(adapters.LoRAConfig(leave_out=[0, 1]))
    assert set(model.state_dict()) == before and list(model.adapters_config) == []
    with pytest.raises(adapters.ConfigError):
        model.supports_adapter("no such method")
