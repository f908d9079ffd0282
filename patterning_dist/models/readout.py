"""Losses of the last residual stream: final norm, unembedding and cross-entropy, a part of the positions at a time.

    logits = norm(x) U + c ,     norm(x) = s(x) (C x) * g + b ,     s(x) = (mean (C x)^2 + eps)^(-1/2)

with C = 1 (RMSNorm) or the centring of every position (LayerNorm). Where x = base + z O, of which z and O move, only s
is not linear, and it is one number a position:

    logits = s(x) (table + z P) + c + b U ,     table = (C base * g) U ,     P = (C O * g) U

``table`` is there once and for all, and z P takes d_head / d_model of the product norm(x) U.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from patterning_dist.models.losses import CHUNK, cross_entropy

_IN_CACHE = 1 << 18  # logits at once on a CPU: they stay in a core's cache until they are summed
_LARGEST = 85.0  # e to the power of it is a float32 number, and so is e^-85


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding, neither of which moves.

    Attributes:
        unembedding: U [d_model, vocabulary].
        eps: of the norm.
        centred: LayerNorm.
        gain: g [d_model]; None: 1.
        bias: c + b U [vocabulary]; None: 0.
    """

    unembedding: Tensor
    eps: float
    centred: bool = False
    gain: Tensor | None = None
    bias: Tensor | None = None

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, like ``targets``.

        Args:
            x: [..., d_model].
            targets: token ids [...].
        """
        inputs = self.normed(x.flatten(0, -2))
        found = _LinearCrossEntropy.apply(inputs, self.unembedding, self.bias, targets.reshape(-1), not self._bounded)
        return found.view(targets.shape)

    def normed(self, x: Tensor) -> Tensor:
        """norm(x) - b."""
        x = self._centred(x)
        return self._gained(x * self._scale(x))

    def pays(self, num_directions: int) -> bool:
        """Whether so many are few enough for a table: at half of d_model it gains nothing, at a quarter 1.6 times."""
        return 4 * num_directions <= len(self.unembedding)

    def table_bytes(self, base: Tensor) -> int:
        """Size of a table."""
        return base.nbytes // base.shape[-1] * self.unembedding.shape[1]

    def table(self, base: Tensor) -> Tensor:
        """[position, vocabulary] of a base [..., d_model]."""
        return self._gained(self._centred(base.flatten(0, -2))) @ self.unembedding

    def losses_by_table(self, table: Tensor, base: Tensor, z: Tensor, output: Tensor, targets: Tensor) -> Tensor:
        """``losses`` of base + z O, without gradients.

        Args:
            table: of the base.
            base: [..., d_model].
            z: [..., direction].
            output: O [direction, d_model].
            targets: token ids [...].
        """
        z = z.flatten(0, -2)
        scale = self._scale(self._centred(torch.addmm(base.flatten(0, -2), z, output)))
        directions, scaled = self._gained(self._centred(output)) @ self.unembedding, z * scale

        def logits(part: slice) -> Tensor:
            found = (scaled[part] @ directions).addcmul_(table[part], scale[part])
            return found if self.bias is None else found.add_(self.bias)

        found = _in_parts(logits, targets.reshape(-1), table.shape[1], shifted=not self._bounded)
        return torch.cat(found).view(targets.shape)

    @cached_property
    def _bounded(self) -> bool:
        """Whether sums of e^logit are in range as they are: no |norm(x) U_v| is above |g U_v| d_model^(1/2)."""
        with torch.no_grad():
            scaled = self.unembedding if self.gain is None else self.gain[:, None] * self.unembedding
            largest = scaled.square().sum(dim=0).max().sqrt() * len(scaled) ** 0.5
            shift = 0.0 if self.bias is None else self.bias.abs().max()
            return bool(largest + shift + math.log(scaled.shape[1]) < _LARGEST)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def _scale(self, x: Tensor) -> Tensor:
        return (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()

    def _gained(self, x: Tensor) -> Tensor:
        return x if self.gain is None else x * self.gain


def readout_of(norm: nn.Module, head: nn.Module) -> Readout | None:
    """Of a final norm and the linear map after it; None where the norm is neither a LayerNorm nor an RMSNorm.

    What a norm does is found by trying: some multiply by their weight, some by 1 + weight.
    """
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, name)), None)
    if not isinstance(head, nn.Linear) or not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    bias, unembedding = getattr(norm, "bias", None), head.weight.T
    with torch.no_grad():
        shift = head.bias if bias is None else bias @ unembedding + (0 if head.bias is None else head.bias)
        x = torch.linspace(-1, 3, 4 * len(weight), device=weight.device, dtype=weight.dtype).view(len(weight), 4).T
        found = norm(x)
        for gain in (weight.detach(), 1 + weight.detach()):
            for centred in (False, True):
                readout = Readout(unembedding, eps, centred, gain, shift)
                wanted = readout.normed(x) + (0 if bias is None else bias)
                if torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * found.abs().max().item()):
                    return readout
    return None


def _in_parts(
    logits: Callable[[slice], Tensor],
    targets: Tensor,
    vocabulary_size: int,
    use: Callable[[slice, Tensor], None] | None = None,
    *,
    shifted: bool,
) -> list[Tensor]:
    """-log softmax at the targets, part by part.

    Args:
        logits: of a part, which are overwritten.
        targets: [position].
        vocabulary_size: number of logits of a position.
        use: takes a part and its probabilities, less 1 at the target.
        shifted: by the largest logit of a position before exponentials are summed.
    """
    size = max(1, (_IN_CACHE if targets.device.type == "cpu" else CHUNK) // vocabulary_size)
    losses = []
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        values, wanted = logits(part), targets[part, None]
        if shifted:
            values.sub_(values.amax(dim=1, keepdim=True))
        hit = values.gather(1, wanted)
        total = values.exp_().sum(dim=1, keepdim=True)
        losses.append((total.log() - hit)[:, 0].float())
        if use is not None:
            use(part, values.div_(total).scatter_add_(1, wanted, torch.full_like(hit, -1.0)))
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of x U + c; its gradient (p - e_target) U^T is taken on the way, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, unembedding: Tensor, bias: Tensor | None, targets: Tensor, shifted: bool
    ) -> Tensor:
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None

        def logits(part: slice) -> Tensor:
            return x[part] @ unembedding if bias is None else torch.addmm(bias, x[part], unembedding)

        def use(part: slice, residual: Tensor) -> None:
            assert gradient is not None
            torch.mm(residual, unembedding.T, out=gradient[part])

        wanted = use if gradient is not None else None
        found = _in_parts(logits, targets, unembedding.shape[1], wanted, shifted=shifted)
        ctx.save_for_backward(x, unembedding, bias, targets, gradient)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x, unembedding, bias, targets, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is to be taken
            with torch.enable_grad():
                logits = x @ unembedding if bias is None else torch.addmm(bias, x, unembedding)
                [gradient] = torch.autograd.grad(cross_entropy(logits, targets), x, above, create_graph=True)
            return gradient, None, None, None, None
        return (gradient * above[0][:, None]).to(x.dtype), None, None, None, None
