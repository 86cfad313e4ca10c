"""Cells that are known to fail, each with the reason; one that starts to pass has to be taken off."""

FAILURES: dict[tuple[str, str], str] = {
    ("convnext", "prompt_tuning"): "the embeddings are no sequence: refused in the first pass only",
    ("deepseek_v4", "prompt_tuning"): "its hash routing reads token ids, which a prompt has none of",
    ("fastspeech2_conformer", "prompt_tuning"): "it has no get_input_embeddings",
    ("glm4_moe_lite", "prefix_tuning"): "keys and values of different widths",
    ("markuplm", "prompt_tuning"): "its XPath embeddings do not grow with the prompt",
    ("mistral_large4_text", "prefix_tuning"): "keys and values of different widths",
    ("mra", "ia3"): "its sparse attention is compiled for CUDA; on a CPU it gives nothing",
    ("mra", "lora"): "its sparse attention is compiled for CUDA; on a CPU it gives nothing",
    ("mra", "prompt_tuning"): "its sparse attention takes lengths of whole blocks only",
    ("vit_mae", "prompt_tuning"): "its embeddings give a tuple: refused in the first pass only",
}
