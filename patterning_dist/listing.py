"""The table of `patterning components`: what can be named in a model, without reading its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from patterning_dist.config import load_config
from patterning_dist.config.kinds import DEFAULT, find_kind
from patterning_dist.models.components import Component, Piece, model_components
from patterning_dist.models.huggingface import language_model_skeleton

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name


@dataclass(frozen=True)
class Row:
    """Components that differ in their numbers only, and how large each of them is [parameters]."""

    name: str
    count: int
    num_coordinates: int
    note: str


def open_model(model: str, revision: str | None) -> nn.Module:
    """The modules behind a folder, a name on the hub, or an experiment file; language models without their weights.

    Raises:
        PatterningError: what the loaders of models and of experiments refuse.
    """
    place = Path(model)
    if (place / "config.yaml").is_file():  # a run directory
        place = place / "config.yaml"
    if place.suffix not in (".yaml", ".yml"):
        return language_model_skeleton(model, revision)
    config = load_config(place)
    return find_kind(config.experiment or DEFAULT).skeleton(config)


def named_components(model: nn.Module) -> list[Component]:
    """All components; of a model that has none but ``everything``, also its parameters, whose names are components."""
    known = list(model_components(model).values())
    if len(known) > 1:
        return known
    pieces = (Piece.whole(name, parameter.shape) for name, parameter in model.named_parameters())
    return known + [Component(piece.parameter, (piece,)) for piece in pieces]


def compressed(components: Iterable[Component]) -> list[Row]:
    """One row for components alike: ``layer.0..11.head.0..7`` stands for 96 heads of one size."""
    alike: dict[tuple[str, int, str], list[Component]] = {}
    for component in components:
        key = (_NUMBER.sub("N", component.name), component.num_coordinates, re.sub(r"\d+", "N", component.note))
        alike.setdefault(key, []).append(component)
    return [row for group in alike.values() for row in _rows(group)]


def print_components(model: str, revision: str | None, every: bool) -> None:
    """The table of a model; ``every``: a line for each component, so that their number is not worth a column."""
    opened = open_model(model, revision)
    known = named_components(opened)
    rows = [Row(c.name, 1, c.num_coordinates, c.note) for c in known] if every else compressed(known)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200, file=console.file)  # for grep
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("component", overflow="fold")
    if not every:
        table.add_column("how many", justify="right")
    table.add_column("parameters" if every else "parameters each", justify="right")
    table.add_column("note")
    for row in rows:
        count = [] if every else [f"{row.count:,}"]
        table.add_row(Text(row.name), *count, f"{row.num_coordinates:,}", Text(row.note))
    parameters = dict(opened.named_parameters())
    console.print(Text(f"{model}: {type(opened).__name__}, {len(parameters)} parameter tensors"))
    console.print(table)
    largest = max(parameters, key=lambda name: parameters[name].dim())
    console.print(
        Text(f"Names are joined by +. Parameter names with *, and slices of them, are components too: {largest}[0:16]")
    )


def _rows(group: Sequence[Component]) -> Iterator[Row]:
    """One row if the numbers in the names are all combinations of theirs, else one for each first number."""
    numbers = [tuple(map(int, _NUMBER.findall(component.name))) for component in group]
    ranges = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    first = group[0]
    if prod(map(len, ranges)) != len(group):
        parts: dict[int, list[Component]] = {}
        for component, number in zip(group, numbers, strict=True):
            parts.setdefault(number[0], []).append(component)
        if len(parts) == 1:
            parts = {i: [component] for i, component in enumerate(group)}
        for part in parts.values():
            yield from _rows(part)
        return
    shown = map(_span, ranges)
    name = _NUMBER.sub(lambda _: next(shown), first.name)
    same = all(component.note == first.note for component in group)
    note = first.note if same else f"the first: {first.note}"
    yield Row(name, len(group), first.num_coordinates, note)


def _span(numbers: list[int]) -> str:
    """Sorted numbers, runs of them as first..last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
