"""Language modeling heads and the embeddings: ties, sizes, access."""

import re

from torch import nn

from .adding import HeadAdder
from .base import PredictionHead
from .dispatch import HeadPlan, HeadSetup
from .language_modeling import CausalLMHead


class VocabularyHeads(HeadAdder):
    """Keeps language modeling heads tied and sized as the embeddings; part of ModelWithFlexibleHeadsAdaptersMixin."""

    _active_heads: HeadSetup

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss counts all items of a step, as that of language models does; others are a batch's mean."""
        heads = self._active()
        return bool(heads) and all(isinstance(head, CausalLMHead) for head in heads)

    def _loss_type(self) -> str | None:
        """transformers' name of a loss whose labels are the next tokens, which Trainer counts one less of."""
        heads = self._active()
        shifts = bool(heads) and all(head.config.get("shift_labels") for head in heads)
        return "ForCausalLM" if shifts else None

    def _active(self) -> list[PredictionHead]:
        return [self.heads[name] for name in HeadPlan.of(self._active_heads).names]

    def get_output_embeddings(self) -> nn.Linear | list[nn.Linear | None] | None:
        """The active head's map onto the vocabulary, or None; a list of them if several heads are active."""
        found = [head.get_output_embeddings() for head in self._active()]
        return found if len(found) > 1 else found[0] if found else None

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the map onto the vocabulary of the active language modeling heads."""
        for head in self._active():
            if isinstance(head, CausalLMHead):
                head.set_output_embeddings(new_embeddings)
        self.follow_heads()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resizes the input embeddings and with them every language modeling head, tied or not.

        Example:
            >>> model.resize_token_embeddings(len(tokenizer))
        """
        size = self.get_input_embeddings().num_embeddings
        heads = [h for h in self.heads.values() if isinstance(h, CausalLMHead) and h.config["vocab_size"] == size]
        tied = {path.rpartition(".")[0] for path in self._tied_heads()}
        active, self._active_heads = self._active_heads, None  # transformers would resize the active head only
        try:
            embeddings: nn.Embedding = super().resize_token_embeddings(
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        finally:
            self._active_heads = active
        for head in heads:
            old = head.get_output_embeddings()
            new = self._get_resized_lm_head(old, embeddings.num_embeddings, mean_resizing=mean_resizing)
            new.requires_grad_(old.weight.requires_grad)
            if self._output_path(head) in tied:
                new.weight = embeddings.weight
            head.set_output_embeddings(new)
        self.follow_heads()
        return embeddings

    def follow_vocabulary(self, size: int) -> None:
        """Also in the configs of the tied heads."""
        super().follow_vocabulary(size)
        weight = self.get_input_embeddings().weight
        for head in self.heads.values():
            if isinstance(head, CausalLMHead) and head.get_output_embeddings().weight is weight:
                head.config["vocab_size"] = size

    def _tied_heads(self) -> dict[str, str]:
        """The weights of heads that are tied, each with the input embeddings' weight that it is tied to."""
        # T5 1.1 says with scale_decoder_outputs=False that its output embeddings are not tied.
        settings = vars(self.config)
        if not settings.get("tie_word_embeddings") or not settings.get("scale_decoder_outputs", True):
            return {}
        outputs = [
            (head, output) for head in self.heads.values() if (output := head.get_output_embeddings()) is not None
        ]
        if not outputs:
            return {}
        embeddings = self.get_input_embeddings()
        source = next(path for path, module in self.named_modules() if module is embeddings)
        shape = embeddings.weight.shape
        fitting = [head for head, output in outputs if output.weight.shape == shape]
        return {f"{self._output_path(head)}.weight": f"{source}.weight" for head in fitting}

    def _output_path(self, head: PredictionHead) -> str:
        output = head.get_output_embeddings()
        path: str = next(path for path, module in head.named_modules() if module is output)
        return f"heads.{head.name}.{path}"

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What transformers reads to tie, load and save: patterns, because a head's name may be one by accident."""
        return {f"{re.escape(path)}$": f"{re.escape(source)}$" for path, source in self._tied_heads().items()}
