"""The types of PEFT that have a counterpart here, one row each."""

from ...errors import CheckpointError, suggestion
from ...methods.adalora import AdaLoRAConfig
from ...methods.boft import BOFTConfig
from ...methods.cpt import CPTConfig
from ...methods.fourierft import FourierFTConfig
from ...methods.hira import HiRAConfig
from ...methods.hra import HRAConfig
from ...methods.ia3 import IA3Config
from ...methods.ln_tuning import LNTuningConfig
from ...methods.loha import LoHaConfig
from ...methods.lokr import LoKrConfig
from ...methods.miss import MiSSConfig
from ...methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from ...methods.oft import OFTConfig
from ...methods.p_tuning import PTuningConfig
from ...methods.prefix_tuning import PrefixTuningConfig
from ...methods.prompt_tuning import PromptTuningConfig
from ...methods.randlora import RandLoRAConfig
from ...methods.road import RoAdConfig
from ...methods.shira import SHiRAConfig
from ...methods.trainable_tokens import TrainableTokensConfig
from ...methods.vblora import VBLoRAConfig
from ...methods.vera import VeraConfig
from ...norms import NormSite
from ...prompts import PromptSite
from ...vocabulary import LookupSite
from . import others
from .forms import Form
from .lora import LORA

MISS = {"r": "r", "mini_r": "mini_r", "miss_dropout": "dropout"}
TOKENS = {"placement": "tokens"}


def same(*names: str) -> dict[str, str]:
    """What has one name in both libraries."""
    return {name: name for name in names}


LYCORIS = same("r", "alpha", "rank_dropout", "module_dropout")
FORMS: tuple[Form, ...] = (
    LORA,
    others.AdaLoRAForm(
        "ADALORA",
        AdaLoRAConfig,
        same("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
        | {"lora_alpha": "alpha", "lora_dropout": "dropout"},
        same("lora_A", "lora_B", "lora_E"),
        unused=("bias",),
    ),
    others.VeRAForm(
        "VERA",
        VeraConfig,
        {"r": "r", "d_initial": "vera_d", "vera_dropout": "dropout"},
        {"vera_lambda_d": "vera_D", "vera_lambda_b": "vera_B"},
        {"vera_A": "lora_A", "vera_B": "lora_B"},
        unused=("bias",),
    ),
    others.IA3Form("IA3", IA3Config, {}, {"ia3_l": "lora_B"}),
    Form(
        "LOHA",
        LoHaConfig,
        LYCORIS,
        same("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        unused=("rank_pattern", "alpha_pattern"),
    ),
    Form(
        "LOKR",
        LoKrConfig,
        LYCORIS | same("decompose_both", "decompose_factor", "rank_dropout_scale"),
        same("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        unused=("rank_pattern", "alpha_pattern"),
    ),
    Form(
        "FOURIERFT",
        FourierFTConfig,
        same("n_frequency", "scaling", "random_loc_seed"),
        same("fourierft_spectrum"),
        unused=("n_frequency_pattern", "bias"),
    ),
    others.VBLoRAForm(
        "VBLORA",
        VBLoRAConfig,
        same("r", "num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std")
        | {"vblora_dropout": "dropout"},
        same("vblora_logits_A", "vblora_logits_B"),
        same("vblora_vector_bank"),
        unused=("bias",),
    ),
    others.RandLoRAForm(
        "RANDLORA",
        RandLoRAConfig,
        same("r", "projection_prng_key", "save_projection")
        | {"randlora_alpha": "alpha", "randlora_dropout": "dropout"},
        same("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        same("randlora_A", "randlora_B"),
        unused=("bias",),
    ),
    Form("SHIRA", SHiRAConfig, same("r", "random_seed"), same("shira_weight", "shira_indices")),
    Form("HIRA", HiRAConfig, {"r": "r", "hira_dropout": "dropout"}, same("hira_A", "hira_B"), unused=("rank_pattern",)),
    Form(
        "OFT",
        OFTConfig,
        same("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
        | {"r": "block_num", "oft_block_size": "block_size", "module_dropout": "dropout"},
        {"oft_R.weight": "oft_R"},
        unused=("bias",),
    ),
    Form(
        "BOFT",
        BOFTConfig,
        {
            "boft_block_size": "block_size",
            "boft_block_num": "block_num",
            "boft_n_butterfly_factor": "n_butterfly_factor",
            "boft_dropout": "dropout",
        },
        same("boft_R", "boft_s"),
        unused=("bias",),
    ),
    Form("HRA", HRAConfig, same("r", "apply_GS"), same("hra_u"), unused=("bias",)),
    others.MiSSForm("MISS", MiSSConfig, MISS, same("miss_block"), unused=("bias",)),
    others.MiSSForm("BONE", MiSSConfig, {"r": "r"}, {"bone_block": "miss_block"}, unused=("bias",)),
    Form("ROAD", RoAdConfig, same("variant", "group_size"), same("road_theta", "road_alpha")),
    others.NormForm(
        "LN_TUNING",
        LNTuningConfig,
        {},
        {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"},
        sites=(NormSite,),
    ),
    others.TokensForm(
        "TRAINABLE_TOKENS",
        TrainableTokensConfig,
        same("token_indices"),
        {"trainable_tokens_delta": "delta"},
        sites=(LookupSite,),
    ),
    others.PromptForm(
        "PROMPT_TUNING",
        PromptTuningConfig,
        tensors={"prompt_embeddings": "prompt_embedding.weight"},
        always=TOKENS,
        sites=(PromptSite,),
    ),
    others.PromptForm(
        "P_TUNING",
        PromptTuningConfig,
        tensors={"prompt_embeddings": "prompt_embedding.weight"},
        always=TOKENS,
        sites=(PromptSite,),
    ),
    others.PromptForm(
        "P_TUNING",
        PTuningConfig,
        same("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
        {"prompt_embeddings": "prompt_embedding.weight"},
        always=TOKENS,
        sites=(PromptSite,),
    ),
    others.PromptForm(
        "MULTITASK_PROMPT_TUNING",
        MultitaskPromptTuningConfig,
        same("num_tasks", "num_ranks"),
        {"prompt_embeddings": "embedding.weight"} | same("prefix_task_cols", "prefix_task_rows"),
        always=TOKENS,
        sites=(PromptSite,),
    ),
    others.PromptForm(
        "CPT",
        CPTConfig,
        same("cpt_token_ids", "cpt_tokens_type_mask", "opt_projection_epsilon", "opt_projection_format_epsilon"),
        {"prompt_embeddings": "embedding"},
        always=TOKENS,
        sites=(PromptSite,),
    ),
    others.PrefixForm(
        "PREFIX_TUNING",
        PrefixTuningConfig,
        shared={"prompt_embeddings": "prefix"},
        always={"flat": True, "shift_positions": True},
        sites=(PromptSite,),
    ),
)
"""Of two rows of one type the first one reads."""


def form_of_type(asked: str, peft_type: str) -> Form:
    """The form of PEFT's files of a type.

    Raises:
        CheckpointError: There is none.
    """
    found = next((form for form in FORMS if form.peft_type == peft_type), None)
    if found is None:
        known = list(dict.fromkeys(form.peft_type for form in FORMS))
        raise CheckpointError(
            f"{asked}: peft_type={peft_type!r} has no counterpart here; {suggestion(peft_type, known)} "
            "Merge the adapter in PEFT (merge_and_unload) and load the result as a model."
        )
    return found
