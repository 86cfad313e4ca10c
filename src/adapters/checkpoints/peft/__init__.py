"""Adapters in PEFT's format: folders with ``adapter_config.json`` that has a ``peft_type``.

``table`` has a row for each of its types, ``forms``, ``lora`` and ``others`` what a row means; ``reading`` and
``writing`` go through a file.
"""

from .live import is_wrapped, take_over
from .loading import check_arguments, default_name, is_peft, read_folder
from .writing import contents_of

__all__ = ["check_arguments", "contents_of", "default_name", "is_peft", "is_wrapped", "read_folder", "take_over"]
