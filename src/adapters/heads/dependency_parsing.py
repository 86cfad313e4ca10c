"""The head for biaffine dependency parsing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..errors import AdapterError
from .base import PredictionHead, hidden_size, label_ids


@dataclass
class DependencyParsingOutput(ModelOutput):
    """Scores of arcs ``(b, s, s + 1)`` and relations ``(b, s, s + 1, n)`` from each word to its head; 0 is the root."""

    loss: torch.Tensor | None = None
    rel_preds: torch.Tensor | None = None
    arc_preds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Biaffine(nn.Module):
    """s_oij = x_i' W_o y_j, ``(b, o, i, j)``; ``bias_x`` and ``bias_y`` append a 1 to x and to y. W starts at 0."""

    def __init__(self, n_in: int, n_out: int = 1, bias_x: bool = True, bias_y: bool = True) -> None:
        super().__init__()
        self.bias_x, self.bias_y = bias_x, bias_y
        self.weight = nn.Parameter(torch.zeros(n_out, n_in + bias_x, n_in + bias_y))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x ``(b, i, d)``, y ``(b, j, d)``."""
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.bias_x else x
        y = torch.cat([y, torch.ones_like(y[..., :1])], dim=-1) if self.bias_y else y
        return torch.einsum("bix,oxy,bjy->boij", x, self.weight, y)


class BiaffineParsingHead(PredictionHead):
    """Scores, for each word, every word and the root as its head, and the label of the arc between them.

    A word is the mean of the hidden states of its tokens, the root is the first token (Glavaš and Vulić 2021,
    arXiv:2008.06788). Loss: cross entropy of the heads plus that of the labels at the heads that are given.
    """

    label_names = ("labels_arcs", "labels_rels")

    def __init__(
        self, model: PreTrainedModel, head_name: str, num_labels: int = 2, id2label: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(head_name)
        self.config = {
            "head_type": "dependency_parsing",
            "num_labels": num_labels,
            "label2id": label_ids(id2label),
        }
        self.padding = model.config.get_text_config().pad_token_id
        self.build(model)

    def build(self, model: PreTrainedModel) -> None:
        """Makes dropout and the two maps."""
        width = hidden_size(model.config)
        self.dropout = nn.Dropout(self.dropout_probability(model.config))
        self.biaffine_arcs = Biaffine(width, 1, bias_y=False)
        self.biaffine_rels = Biaffine(width, self._positive("num_labels", 1))
        self.settle(model)

    def forward(  # type: ignore[override]
        self,
        outputs: ModelOutput,
        cls_output: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = False,
        word_starts: torch.Tensor | None = None,
        labels_arcs: torch.Tensor | None = None,
        labels_rels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Scores and loss from the base model's output.

        Args:
            word_starts: ``(b, w)`` the index of the first token of each word, and last that after the last word;
                padding may follow.
            labels_arcs: ``(b, s)`` the head of each word, counted from 1; the padding token's id where there is none.
            labels_rels: ``(b, s)`` the labels of the arcs.

        Raises:
            AdapterError: there are no ``word_starts``.
        """
        if word_starts is None:
            raise AdapterError(
                f"head {self.name!r}: word_starts is missing; dependency parsing needs the index of each word's first "
                "token, (b, w), and last the index after the last word."
            )
        hidden = self.dropout(outputs[0])
        words = word_means(hidden, word_starts)
        targets = torch.cat([hidden[:, :1], words], dim=1)
        arcs = self.biaffine_arcs(words, targets)[:, 0]
        relations = self.biaffine_rels(words, targets).permute(0, 2, 3, 1)
        loss = None
        if labels_arcs is not None and labels_rels is not None:
            loss = self.loss(arcs, relations, labels_arcs, labels_rels)
        predictions = {"loss": loss, "rel_preds": relations, "arc_preds": arcs}
        return self.result(DependencyParsingOutput, outputs, return_dict, **predictions)

    def loss(
        self, arcs: torch.Tensor, relations: torch.Tensor, labels_arcs: torch.Tensor, labels_rels: torch.Tensor
    ) -> torch.Tensor:
        """The mean over the words with a head."""
        known = (labels_arcs >= 0) & (labels_arcs != self.padding)
        heads, labels = labels_arcs[known], labels_rels[known]
        at_heads = relations[known][torch.arange(len(heads), device=heads.device), heads]
        return nn.functional.cross_entropy(arcs[known], heads) + nn.functional.cross_entropy(at_heads, labels)


def word_means(hidden: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """``(b, s, d)``: for each word the mean of the hidden states of its tokens, then zeros.

    The words end where the starts no longer ascend or leave the sequence, whatever token pads them.
    """
    length = hidden.shape[1]
    begins, ends = starts[:, :-1], starts[:, 1:]
    ascending = (begins >= 0) & (ends > begins) & (ends <= length)
    is_word = ascending.long().cumprod(dim=1).bool()
    tokens = torch.arange(length, device=hidden.device)
    inside = (tokens >= begins[..., None]) & (tokens < ends[..., None]) & is_word[..., None]
    shares = inside / inside.sum(dim=-1, keepdim=True).clamp(min=1)
    words = (shares.to(hidden.dtype) @ hidden)[:, :length]
    return nn.functional.pad(words, (0, 0, 0, length - words.shape[1]))
