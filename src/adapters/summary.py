"""The table that ``adapter_summary`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .model import ModelAdaptersMixin

COLUMNS = {"name": 25, "architecture": 15, "#param": 12, "%param": 12, "active": 8, "train": 8}
FORMATS = {"#param": ",", "%param": ".3f"}


def summary_rows(model: ModelAdaptersMixin) -> list[dict[str, Any]]:
    """One row for each adapter, and one for the model without them; %param is the share of the latter's count."""
    base: nn.Module = model.base_model
    active = model.active_adapters.flatten() if model.active_adapters else set()
    rows = [_row(model, name, name in active) for name in model.adapters_config]
    whole = _count(base.parameters()) - sum(row["#param"] for row in rows)
    for row in rows:
        row["%param"] = row["#param"] / whole * 100
    return [*rows, {"name": "Full model", "#param": whole, "%param": 100.0, "train": not model.model_frozen}]


def summary_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text of 80 columns."""
    line = "".join(
        f"{name.title():{'<' if width > 12 or name == 'architecture' else '>'}{width}}"
        for name, width in COLUMNS.items()
    )
    body = [_line(row) for row in rows]
    return "\n".join(["=" * 80, line, "-" * 80, *body[:-1], "-" * 80, body[-1], "=" * 80])


def _row(model: ModelAdaptersMixin, name: str, active: bool) -> dict[str, Any]:
    modules: list[nn.Module] = [module for _, module in model.adapter_sites.holding(name)]
    modules += model.adapter_sites.shared(name).values()
    config = model.adapters_config.get(name)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return {
        "name": name,
        "architecture": (config and config.architecture) or "bottleneck",
        "active": active,
        "#param": _count(parameters),
        "train": all(parameter.requires_grad for parameter in parameters),
    }


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _line(row: dict[str, Any]) -> str:
    cells = []
    for name, width in COLUMNS.items():
        value = row.get(name, "")
        text = format(int(value) if isinstance(value, bool) else value, FORMATS.get(name, "") if value != "" else "")
        cells.append(f"{text:<{width}}" if name in ("name", "architecture") else f"{text:>{width}}")
    return "".join(cells)
