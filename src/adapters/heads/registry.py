"""The built-in head types, and which of them an architecture offers."""

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
)

from .base import PredictionHead
from .classification import (
    ClassificationHead,
    ImageClassificationHead,
    MultiLabelClassificationHead,
    MultipleChoiceHead,
)
from .dependency_parsing import BiaffineParsingHead
from .language_modeling import BertStyleMaskedLMHead, CausalLMHead, Seq2SeqLMHead
from .tagging import QuestionAnsweringHead, TaggingHead

MODEL_HEAD_MAP: dict[str, type[PredictionHead]] = {
    "classification": ClassificationHead,
    "multilabel_classification": MultiLabelClassificationHead,
    "multiple_choice": MultipleChoiceHead,
    "tagging": TaggingHead,
    "question_answering": QuestionAnsweringHead,
    "image_classification": ImageClassificationHead,
    "dependency_parsing": BiaffineParsingHead,
    "masked_lm": BertStyleMaskedLMHead,
    "causal_lm": CausalLMHead,
    "seq2seq_lm": Seq2SeqLMHead,
}

# What 1.x offers beyond the classes of transformers.
EXTRA_TYPES = {"distilbert": ("causal_lm",), "bert-generation": ("masked_lm",)}
SENTENCE = ("classification", "multilabel_classification")
UNDERSTANDING = (*SENTENCE, "multiple_choice", "tagging", "question_answering", "dependency_parsing")
UNDERSTANDING_MAPPINGS = (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
)


def offered_head_types(kind: type[PreTrainedConfig], encoder_decoder: bool, main_input: str) -> tuple[str, ...]:
    """The head types of an architecture, read off the tasks that transformers has classes for.

    Architectures without one sequence of hidden states (CLIP) offer none; custom heads work there too.
    """
    if main_input == "pixel_values":
        return ("image_classification",) if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else ()
    if encoder_decoder:
        speech = ("seq2seq_lm",) if kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING else ()
        text = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        return (*SENTENCE, "question_answering", "seq2seq_lm") if text else speech
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    extra = EXTRA_TYPES.get(kind.model_type, ())
    if kind in MODEL_FOR_MASKED_LM_MAPPING or "masked_lm" in extra:
        types = (*UNDERSTANDING, "masked_lm")
        return (*types, "causal_lm") if causal or "causal_lm" in extra else types
    if causal:
        return (*SENTENCE, "tagging", "question_answering", "causal_lm")
    if any(kind in mapping for mapping in UNDERSTANDING_MAPPINGS):
        return UNDERSTANDING
    return ()
