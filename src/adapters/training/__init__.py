"""Training: the options of scripts, the model set up by them, trainers that save and resume adapters only."""

from .arguments import AdapterArguments, setup_adapter_training
from .legacy_arguments import AdapterTrainingArguments, Seq2SeqAdapterTrainingArguments
from .loraplus import loraplus_groups
from .quantised import prepare_quantized_training
from .scripts import parse_options, read_table, set_up_logging
from .trainer import AdapterTrainer, AdapterTrainerCallback, Seq2SeqAdapterTrainer

__all__ = [
    "AdapterArguments",
    "AdapterTrainer",
    "AdapterTrainerCallback",
    "AdapterTrainingArguments",
    "Seq2SeqAdapterTrainer",
    "Seq2SeqAdapterTrainingArguments",
    "loraplus_groups",
    "parse_options",
    "prepare_quantized_training",
    "read_table",
    "set_up_logging",
    "setup_adapter_training",
]
