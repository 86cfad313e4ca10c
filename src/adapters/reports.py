"""What a forward pass reports beside its output: how far gates were open, and the weights of fusions."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .context import Record, Report


def with_record(output: Any, record: Record) -> Any:
    """A model's output with what the pass was asked to report."""
    reports = {
        "adapter_gating_scores": _plain(record.gating_scores),
        "adapter_fusion_attentions": _plain(record.fusion_attentions),
    }
    reports = {name: report for name, report in reports.items() if report is not None}
    if isinstance(output, ModelOutput):
        for name, report in reports.items():
            output[name] = report
        return output
    return (*output, *reports.values())


def _plain(records: Any) -> Any:
    """The record as plain dicts of arrays."""
    if records is None:
        return None
    return {
        name: {
            layer: {location: _columns(values) for location, values in places.items()}
            for layer, places in layers.items()
        }
        for name, layers in records.items()
    }


def _columns(reports: list[Report]) -> Any:
    """The values of one place as an array: the rows that have any, in order; sites and further visits in columns."""
    found = [(site, torch.arange(len(v)) if rows is None else rows.cpu(), v.float().cpu()) for site, rows, v in reports]
    present = torch.cat([rows for _, rows, _ in found]).unique()  # type: ignore[no-untyped-call]
    columns: list[Tensor] = []
    last = None
    for site, rows, values in sorted(found, key=itemgetter(0)):
        at = torch.searchsorted(present, rows)
        if site != last or not columns[-1][at].isnan().all():
            columns.append(values.new_full((len(present), *values.shape[1:]), float("nan")))
        columns[-1][at], last = values, site
    return torch.cat(columns, -1).squeeze(-1).numpy()
