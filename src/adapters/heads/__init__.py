"""Prediction heads: any number of named heads on one model."""

from .base import PredictionHead
from .classification import (
    ClassificationHead,
    ImageClassificationHead,
    MultiLabelClassificationHead,
    MultipleChoiceHead,
)
from .dependency_parsing import Biaffine, BiaffineParsingHead, DependencyParsingOutput
from .dispatch import MultiHeadOutput
from .language_modeling import BertStyleMaskedLMHead, CausalLMHead, Seq2SeqLMHead
from .model_mixin import ModelWithFlexibleHeadsAdaptersMixin
from .tagging import QuestionAnsweringHead, TaggingHead

__all__ = [
    "BertStyleMaskedLMHead",
    "Biaffine",
    "BiaffineParsingHead",
    "CausalLMHead",
    "ClassificationHead",
    "DependencyParsingOutput",
    "ImageClassificationHead",
    "ModelWithFlexibleHeadsAdaptersMixin",
    "MultiHeadOutput",
    "MultiLabelClassificationHead",
    "MultipleChoiceHead",
    "PredictionHead",
    "QuestionAnsweringHead",
    "Seq2SeqLMHead",
    "TaggingHead",
]
