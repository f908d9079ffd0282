"""A decoder of ``transformers`` cut around a component: what does not move with it is computed once for a batch.

    x_k = layer k of x_(k-1) = base + part ,     losses = what the model makes of x_k

``base`` is the layer's output without the part: the residual stream, the other heads and, where attention and MLP stand
side by side (GPT-NeoX, GPT-J, Falcon), the MLP. The part is the heads that move, or the module that does, an MLP or the
whole attention. Where more follows in the layer than a sum (an MLP that reads what attention gives, a norm), the layer
runs by itself, with the sum of other heads and part in the place of its attention. What else moves (layers, several
things at once) has the layers below it computed once. Which of these a model can stand, ``models.cutting`` finds out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patterning_dist.models.components import num_bytes
from patterning_dist.models.losses import Tokens, counted_losses, pass_arguments, token_ids
from patterning_dist.models.moving import Part, first, like
from patterning_dist.models.passes import logits, next_token_losses
from patterning_dist.models.readout import Readout


class Beside(NamedTuple):
    """What does not move.

    ``stream``: the residual stream that enters the layer, or that leaves it without the part; ``others``: what the
    attention gives without the part; ``inputs``: arguments of the part's module; ``table``: of ``Readout``.
    """

    stream: Tensor | None
    others: Tensor | None = None
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    table: Tensor | None = None


@dataclass(frozen=True)
class AroundComponent:
    """A ``Layered`` model, see ``sampling.target``.

    Attributes:
        model: in which a component moves.
        blocks: its layers.
        outputs: what the layers and the part's module once gave: a tensor, or a tuple that begins with one.
        at: the layer in which, or from which on, it moves.
        part: of that layer; None: all of it.
        summed: whether the layer does no more with the part than add it.
        readout: what makes losses of the last layer's output; None: not known, or it moves.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    outputs: Mapping[nn.Module, Any]
    at: int
    part: Part | None = None
    summed: bool = False
    readout: Readout | None = None

    @property
    def pays_once(self) -> bool:
        """Of heads that are only added 1.1 to 1.2 times; of others 0.9 to 1."""
        return self.summed and self.part is not None and self.part.output() is not None

    def below(self, batch: Tokens, room: int) -> Beside:
        """See ``Layered``."""
        seen: dict[str, Any] = {}

        def sees_inputs(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            seen["inputs"] = (arguments, options)

        def sees_stream(_: nn.Module, __: Any, output: Any) -> None:
            seen["stream"] = first(output)

        if self.part is None:
            self._until(batch, seen, "stream", self.blocks[self.at - 1])
        elif self.summed:
            with self.part.silenced(), self.part.module.register_forward_pre_hook(sees_inputs, with_kwargs=True):
                self._until(batch, seen, "stream", self.blocks[self.at])
        else:
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(self.part.silenced())
                if self.at > 0:
                    hooks.enter_context(self.blocks[self.at - 1].register_forward_hook(sees_stream))
                self._until(batch, seen, "others", self.part.module)
        state = Beside(seen.get("stream"), seen.get("others"), seen.get("inputs"))
        if self.summed and self.part is not None and self.readout is not None and self.at == len(self.blocks) - 1:
            output, stream = self.part.output(), seen["stream"]
            has_table = output is not None and self.readout.pays(len(output))
            if has_table and num_bytes(state) + self.readout.table_bytes(stream) <= room:
                return state._replace(table=self.readout.table(stream))
        return state

    def above(self, state: Beside, batch: Tokens) -> Tensor:
        """See ``Layered``."""
        return counted_losses(self._losses(state, batch), batch)

    def _losses(self, state: Beside, batch: Tokens) -> Tensor:
        if self.part is None or not self.summed:
            return self._pass(batch, self.at - 1, state.stream, state.others)
        assert state.stream is not None and state.inputs is not None
        z, output = self.part.directions(*state.inputs[0], **state.inputs[1]), self.part.output()
        if self.readout is not None and output is not None and state.table is not None and not torch.is_grad_enabled():
            targets = token_ids(batch)[:, 1:]
            return self.readout.losses_by_table(state.table, state.stream, z, output, targets)
        return self._pass(batch, self.at, state.stream + _times(z, output))

    def _pass(self, batch: Tokens, upto: int, x: Tensor | None, others: Tensor | None = None) -> Tensor:
        """The model's own, with ``x`` for the output of layer ``upto``; ``others``: see ``Beside``."""
        seen: dict[str, Any] = {"stream": x}
        if self.readout is None or upto < len(self.blocks) - 1:
            with contextlib.ExitStack() as changes:
                for number, block in enumerate(self.blocks[: upto + 1]):
                    given = x if number == upto else None
                    changes.enter_context(_replaced(block, self._gives(block, given)))
                if self.part is not None and others is not None:
                    changes.enter_context(_replaced(self.part.module, self._with_part(others)))
                if self.readout is None:
                    return next_token_losses(self.model, token_ids(batch), **pass_arguments(batch))
                self._until(batch, seen, "stream", self.blocks[-1])
        assert self.readout is not None
        return self.readout.losses(seen["stream"], token_ids(batch)[:, 1:])

    def _until(self, batch: Tokens, seen: dict[str, Any], name: str, module: nn.Module) -> None:
        """A pass that is broken off where a module has given its output, which is ``seen`` under a name."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = first(output)
            raise _Enough

        with contextlib.suppress(_Enough), module.register_forward_hook(hook):
            logits(self.model, token_ids(batch)[:, :-1], "tokens", **pass_arguments(batch))

    def _gives(self, block: nn.Module, x: Tensor | None) -> Callable[..., Any]:
        """A pass of a block that gives ``x``, or where that is None what it is given."""

        def forward(*arguments: Any, **options: Any) -> Any:
            entered = arguments[0] if arguments else options["hidden_states"]
            return like(self.outputs[block], entered if x is None else x)

        return forward

    def _with_part(self, others: Tensor) -> Callable[..., Any]:
        part = self.part
        assert part is not None

        def forward(*arguments: Any, **options: Any) -> Any:
            found = others + _times(part.directions(*arguments, **options), part.output())
            return like(self.outputs[part.module], found)

        return forward


class _Enough(Exception):
    """All that was wanted of a pass is there."""


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another pass of a module while it is entered."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _times(z: Tensor, output: Tensor | None) -> Tensor:
    return z if output is None else z @ output
