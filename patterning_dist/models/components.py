"""Components: named parts of a model whose coordinates a restricted posterior is free to move.

A component is a set of *pieces*, boxes of parameters: a head of a fused query-key-value matrix is three column ranges.
Names joined by ``+`` form their union; ``l0h1`` and names of TransformerLens stand for ours
(``config.component_names``). Every model knows

    everything, and patterns of parameter names with optional slices: h.*.mlp.c_fc.weight[0:16,:]

A module names parts of its own by a method ``components() -> dict[str, Component]``, as the attention-only transformer
does. What those of ``transformers`` are made of, ``models.anatomy`` finds.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from patterning_dist.config.component_names import canonical_name
from patterning_dist.errors import PatterningError

Vector = dict[str, Tensor]  # piece name -> free coordinates of a component
Box = tuple[tuple[int, int], ...]  # (start, stop) along every axis

_PATTERN = re.compile(r"(?P<names>[^\[\]]+)(?:\[(?P<slices>[^\[\]]*)\])?$")
# Package that a module's class derives from -> our module that knows its parts, imported when it is needed.
_ANATOMIES = {"transformers": "patterning_dist.models.anatomy"}
_FROZEN = "_frozen_when_it_came"
_SLICE = re.compile(r"(?:(\d+)|(\d*):(\d*))$")


def axpy(scale: float, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Vector:
    """scale * x + y."""
    return {name: v.add(x[name], alpha=scale) for name, v in y.items()}


def scaled(scale: float, x: Mapping[str, Tensor]) -> Vector:
    """scale * x."""
    return {name: scale * v for name, v in x.items()}


def num_bytes(tensors: Any) -> int:
    """Memory behind tensors in tuples, lists and mappings, once where they share it."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Piece:
    """A box of one parameter.

    Attributes:
        parameter: its name in ``model.named_parameters()``.
        shape: of the whole parameter.
        box: (start, stop) along every axis.
    """

    parameter: str
    shape: tuple[int, ...]
    box: Box

    @classmethod
    def whole(cls, parameter: str, shape: Sequence[int]) -> Piece:
        """All of a parameter."""
        return cls(parameter, tuple(shape), tuple((0, size) for size in shape))

    @classmethod
    def along(cls, parameter: str, shape: Sequence[int], axis: int, start: int, stop: int) -> Piece:
        """Rows ``start`` to ``stop`` along one axis."""
        ranges = [(0, size) for size in shape]
        ranges[axis] = (start, stop)
        return cls(parameter, tuple(shape), tuple(ranges))

    @property
    def name(self) -> str:
        """The parameter's name, with the ranges where it is not the whole: ``weight[:,0:16]``."""
        if all(part == (0, size) for part, size in zip(self.box, self.shape, strict=True)):
            return self.parameter
        ranges = [":" if (a, b) == (0, size) else f"{a}:{b}" for (a, b), size in zip(self.box, self.shape, strict=True)]
        return f"{self.parameter}[{','.join(ranges)}]"

    @property
    def num_coordinates(self) -> int:
        """Elements in the box."""
        return math.prod(stop - start for start, stop in self.box)

    def view(self, tensor: Tensor) -> Tensor:
        """The box of a tensor that has the parameter's shape; shares its memory."""
        return tensor[tuple(slice(start, stop) for start, stop in self.box)]

    def covers(self, other: Piece) -> bool:
        """Whether all of ``other`` lies in this box."""
        return self.parameter == other.parameter and all(
            a <= c and d <= b for (a, b), (c, d) in zip(self.box, other.box, strict=True)
        )

    def overlaps(self, other: Piece) -> bool:
        """Whether some element lies in both boxes."""
        return self.parameter == other.parameter and all(
            max(a, c) < min(b, d) for (a, b), (c, d) in zip(self.box, other.box, strict=True)
        )


@dataclass(frozen=True)
class Component:
    """A named set of pieces that do not overlap.

    Attributes:
        name: as written in the experiment.
        pieces: in the order of the model's parameters, then of the boxes.
        first_layer: the lowest layer of an attention-only transformer whose output depends on the component: 0 for the
            embedding, the number of layers for the unembedding. 0 for other models.
        note: what a reader should know, such as which weights are shared.
        num_frozen: coordinates that are not among the pieces, since the model came with them frozen.
    """

    name: str
    pieces: tuple[Piece, ...]
    first_layer: int = 0
    note: str = ""
    num_frozen: int = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it touches."""
        return tuple(dict.fromkeys(piece.parameter for piece in self.pieces))

    @property
    def num_coordinates(self) -> int:
        """Number of free coordinates, d."""
        return sum(piece.num_coordinates for piece in self.pieces)

    def free(self, parameters: Mapping[str, Tensor]) -> Vector:
        """The free coordinates of whole ``parameters``, as views."""
        return {piece.name: piece.view(parameters[piece.parameter]) for piece in self.pieces}


def model_components(model: nn.Module) -> dict[str, Component]:
    """Every component that has a name of its own in this model."""
    if callable(own := getattr(type(model), "components", None)):
        return own(model)
    if anatomy := _anatomy(model):
        return anatomy.language_model_components(model)
    return {"everything": Component("everything", pieces_of(model))}


def pieces_of(model: nn.Module, prefix: str = "") -> tuple[Piece, ...]:
    """All parameters whose names begin with ``prefix``, whole."""
    return tuple(Piece.whole(name, shape) for name, shape in _shapes(model).items() if name.startswith(prefix))


def select_component(model: nn.Module, name: str) -> Component:
    """The component that a name, a pattern of parameter names, or several of them joined by ``+`` stand for.

    Parameters that the model came with frozen (``requires_grad`` False) are left out of it.

    Raises:
        PatterningError: no such component (the names that exist are listed), a slice that does not fit, parts that
            share some of their coordinates but not all, or nothing in it that is not frozen.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> select_component(model, "0.weight").num_coordinates
        6
        >>> select_component(model, "0.weight[0:1]+0.bias").num_coordinates  # a row of the weight, and the bias
        5
    """
    frozen, found = _frozen(model), _selected(model, name)
    free = tuple(piece for piece in found.pieces if piece.parameter not in frozen)
    if not free:
        raise PatterningError(
            f"component {name!r}: all its parameters are frozen (requires_grad is False), like {found.parameters[0]}; "
            "set requires_grad of what may move to True where the model is built"
        )
    kept = Component(name, free, found.first_layer, found.note)
    return replace(kept, num_frozen=found.num_coordinates - kept.num_coordinates)


def _frozen(model: nn.Module) -> frozenset[str]:
    """Parameters that the model came with frozen; remembered, since chains set ``requires_grad`` as they need it."""
    if _FROZEN not in vars(model):
        vars(model)[_FROZEN] = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
    return vars(model)[_FROZEN]


def _selected(model: nn.Module, name: str) -> Component:
    known, shapes = model_components(model), _shapes(model)
    parts = [
        known.get(part) or known.get(canonical_name(part)) or _matching(model, part, shapes, known)
        for part in name.split("+")
    ]
    if len(parts) == 1:
        return Component(name, parts[0].pieces, parts[0].first_layer, parts[0].note)
    kept: list[Piece] = []
    for piece in (piece for part in parts for piece in part.pieces):
        if any(other.covers(piece) for other in kept):
            continue
        kept = [other for other in kept if not piece.covers(other)]
        if clash := next((other for other in kept if other.overlaps(piece)), None):
            raise PatterningError(
                f"component {name!r}: {clash.name} and {piece.name} share a part of their coordinates; "
                "choose slices of which one holds the other, or none of it"
            )
        kept.append(piece)
    order = {parameter: i for i, parameter in enumerate(shapes)}
    kept.sort(key=lambda piece: (order[piece.parameter], piece.box))
    note = "; ".join(dict.fromkeys(part.note for part in parts if part.note))
    return Component(name, tuple(kept), min(part.first_layer for part in parts), note)


def _matching(
    model: nn.Module, part: str, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Component]
) -> Component:
    """A pattern of parameter names, with the same slices for each."""
    match = _PATTERN.match(part)
    names = [parameter for parameter in shapes if match and fnmatch.fnmatchcase(parameter, match["names"])]
    if match is None or not names:
        shown = [*known] if len(known) <= 40 else [*list(known)[:40], f"... ({len(known)} in all)"]
        raise PatterningError(
            f"component {part!r} does not exist in this model; there are: {', '.join(shown)}, patterns of parameter "
            f"names like {next(iter(shapes))!r} (join several with '+'){_reason(model, part)}"
        )
    slices = match["slices"]
    if slices is None:
        return Component(part, tuple(Piece.whole(parameter, shapes[parameter]) for parameter in names))
    return Component(part, tuple(_sliced(part, slices, parameter, shapes[parameter]) for parameter in names))


def _reason(model: nn.Module, part: str) -> str:
    """Why a head that one would expect is not there, where that can be said."""
    anatomy = _anatomy(model)
    reason = anatomy.missing_head(model, part) if anatomy else None
    return f"; {reason}" if reason else ""


def _anatomy(model: nn.Module) -> Any:
    """The module that knows the parts of such models, if there is one."""
    packages = (base.__module__.partition(".")[0] for base in type(model).__mro__)
    path = next((_ANATOMIES[package] for package in packages if package in _ANATOMIES), None)
    return import_module(path) if path else None


def _sliced(part: str, slices: str, parameter: str, shape: tuple[int, ...]) -> Piece:
    texts = slices.split(",")
    wanted = [match for text in texts if (match := _SLICE.match(text.strip()))]
    box = []
    if len(wanted) == len(texts) <= len(shape):
        for match, size in zip(wanted, shape, strict=False):
            if match[1] is not None:
                box.append((int(match[1]), int(match[1]) + 1))
            else:
                box.append((int(match[2] or 0), int(match[3] or size)))
        box += [(0, size) for size in shape[len(box) :]]
    if not box or any(not 0 <= start < stop <= size for (start, stop), size in zip(box, shape, strict=True)):
        raise PatterningError(
            f"component {part!r}: [{slices}] does not fit {parameter}, whose shape is {list(shape)}; "
            "write start:stop or a row for every axis, as in weight[0:16,:]"
        )
    return Piece(parameter, shape, tuple(box))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
