"""The ten architectures as tiny random models, their inputs, and the methods with small sizes."""

import copy
import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

import adapters
from adapters import AdapterConfig, AdapterSetup, LoRAConfig

VOCABULARY, PAD, BOS, EOS = 48, 0, 1, 2
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
HALVES = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZE, **TEXT),
    "roberta": RobertaConfig(**SIZE, **TEXT),
    "distilbert": DistilBertConfig(dim=16, n_layers=2, n_heads=4, hidden_dim=24, **TEXT),
    # three layers of two groups: one that is called twice, and another
    "albert": AlbertConfig(**{**SIZE, "num_hidden_layers": 3}, num_hidden_groups=2, embedding_size=8, **TEXT),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=4, **TEXT),
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2, **TEXT),
    "mistral": MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=3, **TEXT),
    "t5": T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=PAD, **TEXT),
    "bart": BartConfig(
        d_model=16, **HALVES, encoder_ffn_dim=24, decoder_ffn_dim=24, **TEXT, decoder_start_token_id=EOS
    ),
    "vit": ViTConfig(**SIZE, image_size=8, patch_size=4),
}
DECODERS = ("gpt2", "llama", "mistral")
ENCODER_DECODERS = ("t5", "bart")
GENERATORS = (*DECODERS, *ENCODER_DECODERS)
TEXT_MODELS = tuple(name for name in CONFIGS if name != "vit")
ROWS, LENGTH = 4, 6

METHODS: dict[str, AdapterConfig] = {
    name: AdapterConfig.load(text)
    for name, text in {
        "seq_bn": "seq_bn[reduction_factor=4,non_linearity='leakyrelu']",  # no unit of it is ever dead
        "double_seq_bn": "double_seq_bn[reduction_factor=4,cross_adapter=True]",
        "par_bn": "par_bn[reduction_factor=4,non_linearity='leakyrelu']",
        "scaled_par_bn": "scaled_par_bn[reduction_factor=4,non_linearity='leakyrelu']",
        "adapter_plus": "adapter_plus[reduction_factor=4,stochastic_depth=0.0]",
        "prefix_tuning": "prefix_tuning[prefix_length=3,bottleneck_size=8]",
        "prefix_tuning_flat": "prefix_tuning_flat[prefix_length=2]",
        "gated_bn": "double_seq_bn[reduction_factor=4,use_gating=True]",
        "gated_prefix": "prefix_tuning[prefix_length=4,bottleneck_size=8,use_gating=True,shared_gating=False]",
    }.items()
}
EVERYWHERE = {"attn_matrices": ["q", "k", "v", "o"], "intermediate_lora": True, "output_lora": True}
METHODS |= {
    "lora": LoRAConfig(r=4, alpha=8, **EVERYWHERE),
    "ia3": LoRAConfig(r=1, alpha=1, composition_mode="scale", init_weights="ia3", **EVERYWHERE),
    "gated_lora": LoRAConfig(r=4, alpha=8, use_gating=True, **EVERYWHERE),
    "mam": adapters.MAMConfig(METHODS["prefix_tuning_flat"], METHODS["par_bn"]),
    "unipelt": adapters.UniPELTConfig(METHODS["prefix_tuning"], METHODS["seq_bn"], LoRAConfig(r=4, alpha=2)),
}
BOTTLENECKS = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus")
PREFIXES = ("prefix_tuning", "prefix_tuning_flat", "gated_prefix", "mam", "unipelt")
GATED = ("gated_bn", "gated_lora", "gated_prefix", "unipelt")

# One row for each further method, with small sizes. tests/laws/test_method_laws.py runs them all.
MORE_METHODS: dict[str, AdapterConfig] = {}
# What a method claims of itself; names of METHODS and MORE_METHODS.
# Identity at start, with the largest deviation that is allowed: 0 is bit for bit.
IDENTITY: dict[str, float] = {"par_bn": 0, "scaled_par_bn": 0, "lora": 0, "ia3": 0, "gated_lora": 0}
# ``merge_adapter`` works.
MERGES: set[str] = {"lora", "ia3"}
# ``generate`` with a cache is not what it is without.
WITHOUT_CACHE_LAW: set[str] = {*GATED}  # a gate is the mean over the positions that a pass sees
# Architectures that refuse the method, with its reason.
REFUSED: dict[str, tuple[str, ...]] = {}
# The number of parameters at one site, and of what an adapter's modules share.
COUNTS: dict[str, Callable[[Any, Any], int]] = {
    "lora": lambda config, site: config.r * (site.inputs + site.outputs),
    "ia3": lambda config, site: site.outputs,
    "gated_lora": lambda config, site: config.r * (site.inputs + site.outputs) + site.inputs + 1,
    "seq_bn": lambda config, site: 2 * site.width * (w := site.width // 4) + w + site.width,
}
COUNTS |= dict.fromkeys(("double_seq_bn", "par_bn"), COUNTS["seq_bn"])
COUNTS["scaled_par_bn"] = lambda config, site: COUNTS["seq_bn"](config, site) + 1
COUNTS["gated_bn"] = lambda config, site: COUNTS["seq_bn"](config, site) + site.width + 1
COUNTS["adapter_plus"] = lambda config, site: COUNTS["seq_bn"](config, site) + site.width
SHARED_COUNTS: dict[str, Callable[[Any, list[Any]], int]] = {}

MORE_METHODS |= {
    "loha": adapters.LoHaConfig(r=2, **EVERYWHERE),  # in factors
    "loha_wide": adapters.LoHaConfig(r=5, **EVERYWHERE),  # as one matrix
    "lokr": adapters.LoKrConfig(r=1, alpha=2, decompose_both=True, **EVERYWHERE),
    "fourierft": adapters.FourierFTConfig(n_frequency=40, scaling=20, **EVERYWHERE),
    "vblora": adapters.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, topk=3, **EVERYWHERE),
    "randlora": adapters.RandLoRAConfig(r=3, alpha=3, **EVERYWHERE),
}
IDENTITY |= dict.fromkeys(("loha", "loha_wide", "lokr", "fourierft", "randlora"), 0)
MERGES |= {"loha", "loha_wide", "lokr", "fourierft", "vblora", "randlora"}
COUNTS |= dict.fromkeys(("loha", "loha_wide"), lambda config, site: 2 * config.r * (site.inputs + site.outputs))
COUNTS["fourierft"] = lambda config, site: config.n_frequency
COUNTS["vblora"] = lambda config, site: config.r * config.num_vectors * (site.inputs + site.outputs) // 4
SHARED_COUNTS["vblora"] = lambda config, sites: config.num_vectors * config.vector_length
COUNTS["randlora"] = lambda config, site: (d := min(site.inputs, site.outputs), n := -(-d // config.r), n * (3 + d))[2]

MORE_METHODS |= {
    "oft": adapters.OFTConfig(block_size=4, **EVERYWHERE),
    "oft_cayley": adapters.OFTConfig(
        block_size=0, block_num=2, use_cayley_neumann=False, block_share=True, **EVERYWHERE
    ),
    "boft": adapters.BOFTConfig(block_size=2, n_butterfly_factor=3, **EVERYWHERE),
    "hra": adapters.HRAConfig(r=4, **EVERYWHERE),
    "road": adapters.RoAdConfig(group_size=4, **EVERYWHERE),
    "road_4": adapters.RoAdConfig(group_size=8, variant="road_4", **EVERYWHERE),
    "miss": adapters.MiSSConfig(r=5, **EVERYWHERE),
    "miss_mini": adapters.MiSSConfig(r=4, variant="mini", mini_r=8, **EVERYWHERE),
    "miss_bat": adapters.MiSSConfig(r=4, variant="bat", **EVERYWHERE),
}
ORTHOGONAL = ("oft", "oft_cayley", "boft", "hra", "road", "road_4", "miss", "miss_mini", "miss_bat")
IDENTITY |= dict.fromkeys(ORTHOGONAL, 0)
MERGES |= {*ORTHOGONAL}
COUNTS["oft"] = lambda config, site: site.inputs // (k := config.block_size) * k * (k - 1) // 2
COUNTS["oft_cayley"] = lambda config, site: (k := site.inputs // config.block_num) * (k - 1) // 2
COUNTS["boft"] = lambda config, site: config.n_butterfly_factor * site.inputs * config.block_size + site.outputs
COUNTS["hra"] = lambda config, site: config.r * site.inputs
COUNTS |= {"road": lambda config, site: site.outputs, "road_4": lambda config, site: 4 * site.outputs}
COUNTS |= dict.fromkeys(("miss", "miss_bat"), lambda config, site: config.r * site.outputs)
COUNTS["miss_mini"] = lambda config, site: config.r * config.mini_r

MORE_METHODS |= {
    "compacter": AdapterConfig.load("compacter[reduction_factor=4,phm_dim=2,cross_adapter=True]"),
    "compacter_shared": AdapterConfig.load(
        "compacter++[reduction_factor=4,phm_dim=2,shared_W_phm=True,factorized_phm_W=False,factorized_phm_rule=True]"
    ),
    "seq_bn_inv": AdapterConfig.load("seq_bn_inv[reduction_factor=4,non_linearity='leakyrelu']"),
    "glow": AdapterConfig.load("double_seq_bn_inv[reduction_factor=4,inv_adapter='glow']"),
}
COUNTS["compacter"] = lambda config, site: 2 * (site.width + (w := site.width // 4)) + w + site.width
COUNTS["compacter_shared"] = lambda config, site: site.width // 4 + site.width
SHARED_COUNTS["compacter"] = lambda config, sites: config.phm_dim**3
SHARED_COUNTS["compacter_shared"] = lambda config, sites: (
    2 * (sites[0].width * (sites[0].width // 4)) // config.phm_dim + 2 * config.phm_dim**2
)


def with_invertible(shifts: int) -> Callable[[Any, Any], int]:
    """Two networks of the halves, each with `shifts` outputs for each value, beside the bottlenecks."""

    def count(config: Any, site: Any) -> int:
        if site.kind != "embedding":
            return COUNTS["seq_bn"](config, site)
        half, inner = site.width // 2, site.width // 2 // 2
        return 2 * (half * inner + inner + (inner + 1) * half * shifts)

    return count


COUNTS |= {"seq_bn_inv": with_invertible(1), "glow": with_invertible(2)}


PROMPTS: dict[str, AdapterConfig] = {
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
    "p_tuning": adapters.PTuningConfig(prompt_length=2, encoder_hidden_size=6, placement="auto"),
    "p_tuning_lstm": adapters.PTuningConfig(
        prompt_length=2, encoder_reparameterization_type="LSTM", encoder_hidden_size=4, placement="auto"
    ),
    "multitask_prompt": adapters.MultitaskPromptTuningConfig(prompt_length=3, num_ranks=2, placement="auto"),
    "cpt": adapters.CPTConfig(cpt_token_ids=[5, 6, 7], opt_projection_format_epsilon=8.0, placement="auto"),
}
MORE_METHODS |= PROMPTS
REFUSED["cpt"] = ("vit",)  # it starts from tokens
COUNTS["prompt"] = lambda config, site: config.prompt_length * site.width
COUNTS["p_tuning"] = lambda config, site: (
    d := site.width,
    w := config.encoder_hidden_size,
    d * 2 + (d + 1 + w + 1) * w + (w + 1) * d,
)[2]
COUNTS["multitask_prompt"] = lambda config, site: (p := config.prompt_length) * site.width + 2 * (p + site.width)
COUNTS["cpt"] = lambda config, site: 3 * site.width

MORE_METHODS |= {
    "dora": LoRAConfig(r=4, alpha=8, use_dora=True, **EVERYWHERE),
    "vera": LoRAConfig(r=4, alpha=12, init_weights="vera", vera_d=0.5, vera_b=0.0, **EVERYWHERE),
    "dvora": LoRAConfig(r=4, alpha=8, init_weights="vera", use_dora=True, vera_d=0.5, vera_b=0.0, **EVERYWHERE),
    "mtl_lora": adapters.MTLLoRAConfig(r=4, alpha=8, n_up_projection=3, weights_sharpness=0.5, **EVERYWHERE),
    "mtl_dora": adapters.MTLLoRAConfig(
        r=4, n_up_projection=2, task_specific_matrix_type="linear", weights_sharpness=0.5, use_dora=True, **EVERYWHERE
    ),
}
LORA_FAMILY = ("dora", "vera", "dvora", "mtl_lora", "mtl_dora")
IDENTITY |= dict.fromkeys(LORA_FAMILY, 0)
MERGES |= {*LORA_FAMILY}
COUNTS["dora"] = lambda config, site: COUNTS["lora"](config, site) + site.outputs
COUNTS["vera"] = lambda config, site: config.r + site.outputs
COUNTS["dvora"] = lambda config, site: config.r + 2 * site.outputs
COUNTS["mtl_lora"] = lambda config, site: (
    config.r * (site.inputs + (n := config.n_up_projection) * site.outputs) + n + config.r
)
COUNTS["mtl_dora"] = lambda config, site: COUNTS["mtl_lora"](config, site) + config.r * (config.r - 1) + site.outputs


MORE_METHODS |= {
    "loreft": AdapterConfig.load("loreft[r=2,suffix_positions=2]"),
    "noreft": AdapterConfig.load("noreft[r=2,suffix_positions=1,tied_weights=True,non_linearity='tanh']"),
    "direft": AdapterConfig.load("direft[r=2]"),
    "ln_tuning": adapters.LNTuningConfig(),
    "bitfit": adapters.BitFitConfig(),
    "hira": adapters.HiRAConfig(r=2, **EVERYWHERE),
    "shira": adapters.SHiRAConfig(r=2, random_seed=0, **EVERYWHERE),
}
IDENTITY |= dict.fromkeys(("ln_tuning", "bitfit", "hira", "shira"), 0)
MERGES |= {"ln_tuning", "bitfit", "hira", "shira"}
ROUNDED = {"loreft"}  # files hold the orthonormal matrix, the model one that spans the same space
REFUSED["bitfit"] = ("llama", "mistral", "t5")  # these have no biases
COUNTS |= dict.fromkeys(("hira", "shira"), lambda config, site: config.r * (site.inputs + site.outputs))
COUNTS["bitfit"] = lambda config, site: site.width if site.kind == "norm" else site.outputs
COUNTS["ln_tuning"] = lambda config, site: site.width * (1 if site.bias is None else 2)
COUNTS["loreft"] = lambda config, site: 2 * config.r * (2 * site.width + 1)
COUNTS |= dict.fromkeys(("noreft", "direft"), lambda config, site: config.r * (2 * site.width + 1))

# Of LoRA's options those that change what is computed.
LORA_VARIANTS: dict[str, AdapterConfig] = {
    "rslora": LoRAConfig(r=4, alpha=4, use_rslora=True, **EVERYWHERE),
    "pissa": LoRAConfig(r=4, alpha=4, init_weights="pissa", **EVERYWHERE),
    "olora": LoRAConfig(r=4, alpha=4, init_weights="olora", **EVERYWHERE),
    "lora_ga": LoRAConfig(r=4, alpha=4, init_weights="lora_ga", **EVERYWHERE),
    "lora_pattern": LoRAConfig(r=4, rank_pattern={"q": 2, "1": 3}, alpha_pattern={"v": 2}, **EVERYWHERE),
    "adalora": adapters.AdaLoRAConfig(init_r=4, target_r=2, **EVERYWHERE),
}
MORE_METHODS |= LORA_VARIANTS
IDENTITY |= dict.fromkeys(LORA_VARIANTS, 0)
MERGES |= {*LORA_VARIANTS}
COUNTS |= dict.fromkeys(("rslora", "pissa", "olora", "lora_ga"), COUNTS["lora"])
COUNTS["lora_pattern"] = lambda config, site: config.rank_at(site) * (site.inputs + site.outputs)
COUNTS["adalora"] = lambda config, site: config.init_r * (site.inputs + site.outputs + 1)


def generator(name: str) -> torch.Generator:
    """A random stream that depends on nothing but the name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def config(name: str) -> PreTrainedConfig:
    return type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())


@functools.cache
def _built(name: str, head: bool) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    return (auto if head else AutoModel).from_config(config(name)).eval()


def plain(name: str, head: bool = False) -> PreTrainedModel:
    """A model of transformers alone, with random weights that are the same every time."""
    return copy.deepcopy(_built(name, head))


def inputs(name: str, rows: int = ROWS, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch with padding, on the side that is asked for."""
    source = generator(name)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=source)}
    tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=source)
    mask = torch.ones_like(tokens)
    for row, padding in ((1, slice(-2, None)), (3, slice(-1, None))):
        mask[row % rows, padding] = 0
    mask = mask.flip(1) if side == "left" else mask
    batch = {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}
    if name in ENCODER_DECODERS:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=source)
        decoder_mask = torch.ones_like(tokens)
        decoder_mask[2 % rows, -2:] = 0
        batch["decoder_attention_mask"] = decoder_mask
    return batch


def rows_of(batch: dict[str, torch.Tensor], rows) -> dict[str, torch.Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def positions(name: str) -> int:
    """The length of the sequences of ``inputs``."""
    return 5 if name == "vit" else LENGTH


@torch.no_grad()
def disturb(model, adapter: str, scale: float = 0.2) -> None:
    """Noise on every parameter of an adapter, so that it is not the identity."""
    source = generator(adapter)
    for module in model._modules_of(adapter):
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter) * scale)


def adapted(name: str, *methods: str, head: bool = False):
    """A model with an adapter of each method, named for it."""
    model = plain(name, head)
    adapters.init(model)
    for method in methods:
        model.add_adapter(method, METHODS[method])
        disturb(model, method)
    return model


@functools.cache
def shared(name: str):
    """A model with every method thrice: `M_a`, `M_b`, and `M_partial` that leaves out layer 0. Not to be changed."""
    model = plain(name)
    adapters.init(model)
    for method, configuration in METHODS.items():
        for suffix in ("a", "b", "partial"):
            left_out = [0] if suffix == "partial" else []
            model.add_adapter(f"{method}_{suffix}", changed(configuration, leave_out=left_out))
            disturb(model, f"{method}_{suffix}")
    return model


def changed(configuration: AdapterConfig, **fields: Any) -> AdapterConfig:
    """Other values of the fields that a configuration, or a member of a union, has."""
    if isinstance(configuration, adapters.ConfigUnion):
        return adapters.ConfigUnion(*(changed(part, **fields) for part in configuration.configs))
    return configuration.replace(**{key: value for key, value in fields.items() if key in configuration})


@torch.no_grad()
def output(model, batch, **kwargs) -> torch.Tensor:
    """The first output, under the active setup; of a longer one, the states of the tokens, which stand last."""
    states = model(**batch, **kwargs)[0]
    tokens = batch.get("decoder_input_ids", batch.get("input_ids"))
    return states[:, -(5 if tokens is None else tokens.shape[1]) :]


def run(model, batch, setup, **kwargs) -> torch.Tensor:
    """The first output, under `setup`."""
    with AdapterSetup(setup):
        return output(model, batch, **kwargs)
