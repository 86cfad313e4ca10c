"""The head for dependency parsing: words, scores, loss."""

from itertools import pairwise

import pytest
import torch
from head_models import WORD_STARTS, adapter_model, batch
from torch.nn.functional import cross_entropy

from adapters import AdapterError, BiaffineParsingHead
from adapters.heads.dependency_parsing import Biaffine, word_means


def naive_means(hidden, starts):
    """Word by word, as the format of the labels defines them."""
    rows = torch.zeros_like(hidden)
    for row, indices in enumerate(starts.tolist()):
        for word, (begin, end) in enumerate(pairwise(indices)):
            if end <= begin:
                break
            rows[row, word] = hidden[row, begin:end].mean(dim=0)
    return rows


@pytest.mark.parametrize("padding", [0, 1, -1, 50_000])
def test_words_are_the_means_of_their_tokens_whatever_pads_them(padding):
    hidden = torch.randn(3, 7, 4, dtype=torch.float64)
    starts = torch.tensor([[1, 2, 4, 7], [1, 4, padding, padding], [padding, padding, padding, padding]])
    kept = starts.where(starts < 100, 0)
    torch.testing.assert_close(word_means(hidden, starts), naive_means(hidden, kept))
    assert word_means(hidden, starts)[1, 1:].eq(0).all() and word_means(hidden, starts)[2].eq(0).all()


def test_biaffine_scores_follow_the_formula():
    layer = Biaffine(3, 2, bias_y=False)
    torch.nn.init.normal_(layer.weight)
    x, y = torch.randn(1, 4, 3), torch.randn(1, 5, 3)
    expected = torch.cat([x[0, 2], torch.ones(1)]) @ layer.weight[1] @ y[0, 3]
    torch.testing.assert_close(layer(x, y)[0, 1, 2, 3], expected)


def test_scores_have_the_root_as_the_first_head():
    model = adapter_model("bert")
    model.add_dependency_parsing_head("ud", num_labels=5)
    head = model.heads["ud"]
    assert isinstance(head, BiaffineParsingHead) and list(head.state_dict()) == [
        "biaffine_arcs.weight",
        "biaffine_rels.weight",
    ]
    assert head.biaffine_arcs.weight.shape == (1, 17, 16) and head.biaffine_rels.weight.shape == (5, 17, 17)
    output = model(**batch("bert"), word_starts=WORD_STARTS)
    assert output.arc_preds.shape == (2, 6, 7) and output.rel_preds.shape == (2, 6, 7, 5)
    assert output.arc_preds.eq(0).all() and "loss" not in output  # the maps start at 0


def test_the_loss_leaves_out_words_without_a_head():
    model = adapter_model("bert")
    model.add_dependency_parsing_head("ud", num_labels=2)
    torch.nn.init.normal_(model.heads["ud"].biaffine_arcs.weight)
    arcs, relations = torch.tensor([[2, 0, -100, 0, 0, 0]] * 2), torch.zeros(2, 6, dtype=torch.long)
    output = model(**batch("bert"), word_starts=WORD_STARTS, labels_arcs=arcs, labels_rels=relations)
    two = torch.tensor([2, 2])
    expected = cross_entropy(output.arc_preds[:, 0], two) + cross_entropy(output.rel_preds[:, 0, 2], two * 0)
    torch.testing.assert_close(output.loss, expected)


def test_word_starts_are_asked_for():
    model = adapter_model("bert")
    model.add_dependency_parsing_head("ud")
    with pytest.raises(AdapterError, match="word_starts is missing"):
        model(**batch("bert"))


def test_half_precision():
    model = adapter_model("bert").to(torch.bfloat16)
    model.add_dependency_parsing_head("ud")
    assert model(**batch("bert"), word_starts=WORD_STARTS).arc_preds.dtype == torch.bfloat16
