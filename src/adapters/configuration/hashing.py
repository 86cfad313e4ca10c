"""The short identifier of a configuration."""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha1
from typing import Any

_DEFAULTS = {
    "phm_layer": True,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_phm_rule": True,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "init_weights": "bert",
    "scaling": 1.0,
    "random_uniform_scale": 0.5,
    "placement": "auto",
    "subtract_projection": True,
}
"""Left out when equal, so that a field which 1.x did not have does not change the hash of what it had."""


def get_adapter_config_hash(config: Mapping[str, Any], length: int = 16, ignore_params: Iterable[str] = ()) -> str:
    """The first ``length`` hex digits of a SHA-1 over the fields that are not empty, False, zero or at a default.

    The value is that of 1.x for every configuration which 1.x has. It is short, not unique: a Compacter and a dense
    bottleneck with the same other fields share it (``phm_layer=True`` is left out), and so do NoReFT and DiReFT.

    Example:
        >>> get_adapter_config_hash(LoRAConfig())
        '625403edad0bf919'
    """
    ignored = set(ignore_params)
    values = _without_empty({name: value for name, value in config.items() if name not in ignored})
    minimal = {name: value for name, value in values.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
    return sha1(json.dumps(minimal, sort_keys=True).encode()).hexdigest()[:length]


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_empty(value) if isinstance(value, Mapping) else value for name, value in values.items() if value
    }
