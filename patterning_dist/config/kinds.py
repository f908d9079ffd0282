"""Kinds of experiments, found by name: the loop for any task, those that come with the package, and the user's own."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from patterning_dist.errors import PatterningError

DEFAULT = "loop"
_GROUP = "patterning_dist.experiments"  # of entry points of other packages
_OWN = {
    DEFAULT: "patterning_dist.experiments.loop:Loop",
    "parentheses": "patterning_dist.experiments.two_rules:TwoRules",
}


def find_kind(name: str) -> Any:
    """The experiment of a name: built in, an entry point ``patterning_dist.experiments``, or ``package.module:Class``.

    Raises:
        PatterningError: there is none.
    """
    others = {point.name: point.value for point in entry_points(group=_GROUP)}
    path = (_OWN | others).get(name, name)
    module, _, attribute = path.partition(":")
    try:
        if not attribute:
            raise ImportError("no such name")
        return getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise PatterningError(
            f"experiment: '{name}' cannot be loaded ({error}); expected one of {', '.join(sorted(_OWN | others))}, "
            "or package.module:Class"
        ) from None


def kind_names() -> list[str]:
    """Names that an experiment file may give, apart from the user's own classes."""
    return sorted({*_OWN, *(point.name for point in entry_points(group=_GROUP))})
