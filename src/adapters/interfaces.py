"""Data on architectures that no rule can read off a model, each row with its reason."""

SWAPPED_FEED_FORWARD: frozenset[str] = frozenset({"llama", "mistral"})
"""Model types for which 1.x ties `intermediate_lora` to the down projection and `output_lora` to the up projection.

Kept since 1.x's checkpoints of these two families pair the flags and the weights so.
"""

PREFIX_LOCATIONS: dict[str, str] = {"distilbert": "self"}
"""Model types whose prefixes stand under another name than ``self_prefix`` in 1.x's checkpoints and ``get_adapter``."""

POSITIONS_FROM_MASK: frozenset[str] = frozenset({"opt", "biogpt"})
"""Model types that count positions over the real tokens of the mask where they are given none; others count all."""

WITHOUT_PROMPTS: dict[str, str] = {
    "deepseek_v4": "its routing by hash reads token ids, of which a prompt has none",
    "gemma4": "it looks its embeddings up in the table to find what each layer adds for a token",
    "lilt": "its layout runs in a stream of its own beside the text",
    "funnel": "its attention pools over lengths that are taken from the tokens",
    "mra": "its attention takes lengths of whole blocks only",
}
"""Model types whose input cannot be lengthened by embeddings, and why."""

MASK_OF_TOKENS: frozenset[str] = frozenset({"layoutlm", "lxmert", "markuplm"})
"""Model types that make a mask of the length of their tokens, not of their embeddings, where they are given none."""
