"""The trainers under the name that 1.x gave them."""

from .training.trainer import AdapterTrainer, AdapterTrainerCallback, Seq2SeqAdapterTrainer, logger

__all__ = ["AdapterTrainer", "AdapterTrainerCallback", "Seq2SeqAdapterTrainer", "logger"]
