"""The one function that gives every composition block its meaning, at every site and for every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from .composition import Average, BatchSplit, Block, Fuse, MultiTask, Parallel, Route, Setup, Split, Stack
from .context import Forward, current
from .errors import CompositionError
from .signals import Signal

if TYPE_CHECKING:
    from .grouping import Group
    from .sites import Site

S = TypeVar("S", bound=Signal)


def evaluate(tree: Setup, signal: S, site: Site) -> S:
    """Send `signal` through `tree` at `site`; a name with no module there, or None, is the identity."""
    if tree is None:
        return signal
    if isinstance(tree, str):
        return site.apply(tree, signal)
    if isinstance(tree, Stack):
        for child in reversed(tree.children) if signal.backwards else tree.children:
            signal = evaluate(child, signal, site)
        return signal
    if isinstance(tree, Fuse):
        return site.fuse(tree, signal)
    if isinstance(tree, Average):
        return type(signal).mean([evaluate(child, signal, site) for child in tree.children], tree.weights)
    if isinstance(tree, Route):
        outputs = [evaluate(child, signal, site) for child in tree.children]
        return type(signal).mean(outputs, site.adapters[tree.gate].mix(signal, tree.experts()))
    if isinstance(tree, Split):
        return _evaluate_split(tree, signal, site)
    if isinstance(tree, MultiTask):
        return _evaluate_tasks(tree, signal, site)
    if isinstance(tree, BatchSplit):
        sizes = _batch_sizes(tree, len(signal), site)
    else:  # Parallel: the batch was repeated once per child when it entered the model
        sizes = _channel_sizes(tree, len(signal), site)
    return _evaluate_rows(tree, sizes, signal, site)


def check_batch(forward: Forward, rows: int | None) -> None:
    """Refuse a batch of so many rows (None: unknown) that sizes, tasks or names of the setup do not fit.

    Not for the passes of ``generate``, which repeats rows in place: what it was given is checked.
    """
    if rows is None:
        return
    for asked, values in (("adapter_names", forward.assignment), ("task_ids", forward.task_ids)):
        if values is not None and len(values) != rows:
            raise CompositionError(
                f"{asked}: it has {len(values)} entries, the batch has {rows} rows; give one entry for each row."
            )
    _check_sizes(forward.setup, rows)


def _check_sizes(tree: Setup, rows: int) -> None:
    if isinstance(tree, BatchSplit):
        if rows != sum(tree.batch_sizes):
            raise _sizes_differ(tree, rows)
        for child, size in zip(tree.children, tree.batch_sizes, strict=True):
            _check_sizes(child, size)
    elif isinstance(tree, Block) and not isinstance(tree, MultiTask):
        for child in tree.children:
            _check_sizes(child, rows // len(tree) if isinstance(tree, Parallel) else rows)


def _sizes_differ(tree: BatchSplit, rows: int) -> CompositionError:
    return CompositionError(
        f"BatchSplit(batch_sizes={tree.batch_sizes}): sizes sum to {sum(tree.batch_sizes)}, the batch has {rows} rows; "
        "they must be equal."
    )


def _evaluate_rows(tree: Block, sizes: Sequence[int], signal: S, site: Site) -> S:
    group = _group(tree, signal, site)
    if group is not None and group.complete and len(set(sizes)) == 1:
        return group.apply(signal, None)
    if group is not None and group.suits(len(signal)):
        return group.apply(signal, [child for child, size in enumerate(sizes) for _ in range(size)])
    return _evaluate_parts(tree.children, sizes, signal, site)


def _group(tree: Block, signal: Signal, site: Site) -> Group | None:
    """The children in one call, which is for states (b, s, d) and ids (b, s); maps and packed rows go one by one."""
    features = signal.features
    return site.group(tree) if features.dim() == 3 or not features.is_floating_point() else None


def _evaluate_parts(children: Sequence[Setup], sizes: Sequence[int], signal: S, site: Site) -> S:
    parts = zip(children, sizes, signal.split(sizes), strict=True)
    outputs = [evaluate(child, part, site) for child, size, part in parts if size]
    if not outputs:
        return signal
    return replace(type(signal).cat(outputs), rows=signal.rows)


def _channel_sizes(tree: Block, rows: int, site: Site) -> list[int]:
    if len(tree) > 1 and (not site.rows_are_repeated or rows % len(tree)):
        raise CompositionError(
            f"{tree}: a part of the model was called by itself with {rows} rows, which were not repeated for the "
            f"{len(tree)} channels; call the model as a whole, or this part under AdapterSetup with another block."
        )
    return [rows // len(tree)] * len(tree)


def _batch_sizes(tree: BatchSplit, rows: int, site: Site) -> list[int]:
    sizes, total = tree.batch_sizes, sum(tree.batch_sizes)
    if rows == total:
        return sizes
    if total and rows % total == 0 and site.rows_are_expanded:  # generate repeats each row in place for its beams
        return [size * (rows // total) for size in sizes]
    raise _sizes_differ(tree, rows)


def _evaluate_split(tree: Split, signal: S, site: Site) -> S:
    """Each child its own positions: of all that the sequence has so far, those of this pass."""
    begin, start = signal.span or (0, _past(site))
    stop, parts = start + signal.positions(), []
    for child, size in zip(tree.children, tree.sizes(stop - begin), strict=True):
        first, end = max(begin, start), begin + size
        if first < end:
            window = signal.window(first - start, end - start)
            parts.append(evaluate(child, replace(window, span=(begin, first)), site))
        begin = end
    return replace(type(signal).join(parts, 1), span=signal.span)


def _past(site: Site) -> int:
    """The number of positions of the sequence at `site` that former passes put into a cache."""
    forward = current()
    return int(forward.past) if forward is not None and forward.sites is site.owner and site.source != "encoder" else 0


def check_growing(setup: Block, counted: bool) -> None:
    """Refuse a setup that says something else of a position when more positions have come, as in ``generate``.

    counted: the model's cache tells how many positions it has.

    Raises:
        CompositionError: a Split does not end with the child of None, or positions are not counted.
    """
    for block in setup.blocks():
        if isinstance(block, Split) and not counted:
            raise CompositionError(
                f"generate with {setup}: the cache of this model does not tell how many positions it has, so no "
                "part of the sequence can be told; use another block."
            )
        if isinstance(block, Split) and block.splits[-1] is not None:
            raise CompositionError(
                f"generate with {setup}: the sequence grows, and splits={block.splits} do not fit all of its lengths; "
                "let the last child have all that is left: splits=[…, None]."
            )


def _evaluate_tasks(tree: MultiTask, signal: S, site: Site) -> S:
    tasks = signal.own(site.task_ids(tree), site.rows_are_expanded)
    if len(tasks) != len(signal):
        raise CompositionError(f"{tree}: {len(tasks)} tasks for {len(signal)} rows; there must be one for each row.")
    group = _group(tree, signal, site)
    if group is not None and group.suits(len(signal)):
        return group.apply(signal, tasks)
    if torch.compiler.is_compiling():  # how many rows each child has is not known to the graph: each gets all
        selected = signal
        for number, child in enumerate(tree.children):
            selected = selected.select((tasks == number).to(signal.features.device), evaluate(child, signal, site))
        return selected
    order = torch.argsort(tasks, stable=True)
    sizes = torch.bincount(tasks, minlength=len(tree)).tolist()
    output = _evaluate_parts(tree.children, sizes, signal.take(order), site)
    return replace(output.take(torch.argsort(order)), rows=signal.rows)
