"""The types of PEFT that have a counterpart here, one row each."""

from ... import configuration as ours
from ...errors import CheckpointError, suggestion
from ...norms import NormSite
from ...vocabulary import LookupSite
from . import others
from .forms import Form
from .lora import LORA


def same(names: str) -> dict[str, str]:
    """What has one name in both libraries."""
    return {name: name for name in names.split()}


LYCORIS = same("r alpha rank_dropout module_dropout")
LOKR = same("lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b")
ADALORA = same("init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step")
VBLORA = same("r num_vectors vector_length topk init_vector_bank_bound init_logits_std")
RANDLORA = same("r projection_prng_key save_projection")
OFT = same("coft eps block_share use_cayley_neumann num_cayley_neumann_terms")
BOFT = {"boft_block_size": "block_size", "boft_block_num": "block_num", "boft_dropout": "dropout"}
MISS = same("r mini_r") | {"miss_dropout": "dropout"}
NORM = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
ENCODER = same("encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout")
CPT = same("cpt_token_ids cpt_tokens_type_mask opt_projection_epsilon opt_projection_format_epsilon")
PROMPT = {"prompt_embeddings": "prompt_embedding.weight"}
TASKS = {"prompt_embeddings": "embedding.weight"} | same("prefix_task_cols prefix_task_rows")

FORMS: tuple[Form, ...] = (
    LORA,
    others.AdaLoRAForm(
        "ADALORA",
        ours.AdaLoRAConfig,
        ADALORA | {"lora_alpha": "alpha", "lora_dropout": "dropout"},
        same("lora_A lora_B lora_E"),
    ),
    others.VeRAForm(
        "VERA",
        ours.VeraConfig,
        {"r": "r", "d_initial": "vera_d", "vera_dropout": "dropout"},
        {"vera_lambda_d": "vera_D", "vera_lambda_b": "vera_B"},
        {"vera_A": "lora_A", "vera_B": "lora_B"},
    ),
    others.IA3Form("IA3", ours.IA3Config, {}, {"ia3_l": "lora_B"}),
    Form("LOHA", ours.LoHaConfig, LYCORIS, same("hada_w1_a hada_w1_b hada_w2_a hada_w2_b")),
    Form("LOKR", ours.LoKrConfig, LYCORIS | same("decompose_both decompose_factor rank_dropout_scale"), LOKR),
    Form("FOURIERFT", ours.FourierFTConfig, same("n_frequency scaling random_loc_seed"), same("fourierft_spectrum")),
    others.VBLoRAForm(
        "VBLORA",
        ours.VBLoRAConfig,
        VBLORA | {"vblora_dropout": "dropout"},
        same("vblora_logits_A vblora_logits_B"),
        same("vblora_vector_bank"),
    ),
    others.RandLoRAForm(
        "RANDLORA",
        ours.RandLoRAConfig,
        RANDLORA | {"randlora_alpha": "alpha", "randlora_dropout": "dropout"},
        same("randlora_lambda randlora_gamma randlora_A randlora_B"),
        same("randlora_A randlora_B"),
    ),
    Form("SHIRA", ours.SHiRAConfig, same("r random_seed"), same("shira_weight shira_indices")),
    Form("HIRA", ours.HiRAConfig, {"r": "r", "hira_dropout": "dropout"}, same("hira_A hira_B")),
    Form(
        "OFT",
        ours.OFTConfig,
        OFT | {"r": "block_num", "oft_block_size": "block_size", "module_dropout": "dropout"},
        {"oft_R.weight": "oft_R"},
    ),
    Form("BOFT", ours.BOFTConfig, BOFT | {"boft_n_butterfly_factor": "n_butterfly_factor"}, same("boft_R boft_s")),
    Form("HRA", ours.HRAConfig, same("r apply_GS"), same("hra_u")),
    others.MiSSForm("MISS", ours.MiSSConfig, MISS, same("miss_block")),
    others.MiSSForm("BONE", ours.MiSSConfig, {"r": "r"}, {"bone_block": "miss_block"}),
    Form("ROAD", ours.RoAdConfig, same("variant group_size"), same("road_theta road_alpha")),
    others.NormForm("LN_TUNING", ours.LNTuningConfig, {}, NORM, sites=(NormSite,)),
    others.TokensForm(
        "TRAINABLE_TOKENS",
        ours.TrainableTokensConfig,
        same("token_indices"),
        {"trainable_tokens_delta": "delta"},
        sites=(LookupSite,),
    ),
    others.PromptForm("PROMPT_TUNING", ours.PromptTuningConfig, {}, PROMPT),
    others.PromptForm("P_TUNING", ours.PromptTuningConfig, {}, PROMPT),
    others.PromptForm("P_TUNING", ours.PTuningConfig, ENCODER, PROMPT),
    others.PromptForm("MULTITASK_PROMPT_TUNING", ours.MultitaskPromptTuningConfig, same("num_tasks num_ranks"), TASKS),
    others.PromptForm("CPT", ours.CPTConfig, CPT, {"prompt_embeddings": "embedding"}),
    others.PrefixForm("PREFIX_TUNING", ours.PrefixTuningConfig, shared={"prompt_embeddings": "prefix"}),
)
"""Of two rows of one type the first one reads."""


def form_of_type(asked: str, peft_type: str) -> Form:
    """The form of PEFT's files of a type.

    Raises:
        CheckpointError: There is none.
    """
    found = next((form for form in FORMS if form.peft_type == peft_type), None)
    if found is None:
        raise CheckpointError(
            f"{asked}: peft_type={peft_type!r} has no counterpart here; "
            f"{suggestion(peft_type, dict.fromkeys(form.peft_type for form in FORMS))} "
            "Merge the adapter in PEFT (merge_and_unload) and load the result as a model."
        )
    return found
