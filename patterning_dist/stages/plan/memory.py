"""Memory of a rank, from sizes alone: of a chain, and of a training under DeepSpeed's ZeRO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from patterning_dist.config import SamplingConfig
from patterning_dist.models.components import Component
from patterning_dist.sampling.footprint import Footprint
from patterning_dist.sampling.shard import sharded_units

_FLOAT = 4  # bytes
# Vectors of free coordinates that a sampler keeps, and temporaries that a step has of a piece, while those of the piece
# before are still there.
_STATE = {"sgld": 0, "rmsprop_sgld": 1, "sgnht": 1}
_TEMPORARIES = {"sgld": 3, "rmsprop_sgld": 6, "sgnht": 4}
_CURVATURE_VECTORS = 6  # of conjugate gradients, and what they are given
# Of DeepSpeed, in numbers: buckets, and what stage 3 has put together at once.
_BUCKET, _LIVE, _PREFETCHED = 500_000_000, 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Sizes:
    """What a model is made of.

    Attributes:
        shapes: of all parameters, by name.
        units: numbers of parameters that are put together at once where the model is cut over ranks, largest first.
    """

    shapes: Mapping[str, tuple[int, ...]]
    units: Sequence[int]

    @classmethod
    def of(cls, model: nn.Module) -> Sizes:
        """Of a model with or without weights."""
        units = sorted((sum(p.numel() for p in unit) for unit in sharded_units(model)), reverse=True)
        return cls({name: tuple(p.shape) for name, p in model.named_parameters()}, [*units, 0, 0])

    @property
    def num_parameters(self) -> int:
        """N."""
        return sum(map(math.prod, self.shapes.values()))

    def part(self, names: Sequence[str], num_ranks: int) -> int:
        """Bytes of the largest rank's part of parameters, which are cut along their first axis."""
        return _FLOAT * sum(_cut(self.shapes[name], num_ranks) for name in names)


def _cut(shape: Sequence[int], num_ranks: int) -> int:
    return math.prod(shape) if not shape else -(-shape[0] // num_ranks) * math.prod(shape[1:])


def chain_memory(
    sizes: Sizes,
    component: Component,
    sampling: SamplingConfig,
    num_ranks: int,
    passes: Footprint,
    product: Footprint | None = None,
) -> dict[str, int]:
    """Bytes of one rank of a chain, by what they are for.

    Args:
        sizes: of the model.
        component: that moves.
        sampling: section of the experiment.
        num_ranks: of the chain.
        passes: forward and backward of one micro-batch.
        product: of a Hessian with a vector on one rank; None: none is taken.
    """
    moving, kind = list(component.parameters), sampling.sampler.kind
    pieces = sorted((_cut([b - a for a, b in p.box], num_ranks) * _FLOAT for p in component.pieces), reverse=True)
    free, gradient = sum(pieces), sizes.part(moving, num_ranks)
    gradients = gradient
    if sampling.gradient == "control_variate":  # that of w*, where the chain is meanwhile, and both of a minibatch
        gradients += 2 * free + gradient
    if getattr(sampling.sampler, "correction", False):  # signs, where the chain is meanwhile, and two sides
        gradients += 2 * free + 2 * gradient
    # What is put together: a unit, with its whole gradient and what that is sent from; the next ones come meanwhile.
    first, second = (_FLOAT * unit for unit in sizes.units[:2])
    whole = 0 if num_ranks == 1 else 3 * first + first // num_ranks + 2 * second
    step = _TEMPORARIES[kind] * sum(pieces[:2])
    transient = max(passes.peak_bytes + whole, step)
    if product is not None:
        # On several ranks a product is the difference of two gradients.
        exact = product.peak_bytes if num_ranks == 1 else passes.peak_bytes + whole + gradient
        transient = max(transient, exact + _CURVATURE_VECTORS * free)
    return {
        "weights": sizes.part(list(sizes.shapes), num_ranks),
        "w*": free,
        "gradient": gradients,
        "sampler": _STATE[kind] * free,
        "passes": transient,
    }


def cache_memory(sizes: Sizes, vocabulary_size: int, num_positions: int, num_samples: int, limit: int) -> int:
    """Bytes of what a chain of a language model keeps of samples, at most: see ``models.around``.

    Args:
        sizes: of the model.
        vocabulary_size: a table has a number for each of it.
        num_positions: of a sample.
        num_samples: that are evaluated again and again.
        limit: ``sampling.cache_gib`` in bytes.
    """
    widths = [min(shape) for shape in sizes.shapes.values() if vocabulary_size in shape]
    numbers = vocabulary_size + 3 * max(widths, default=0) + num_positions  # stream, inputs, others; a row of a mask
    return min(limit, _FLOAT * num_samples * num_positions * numbers)


def training_memory(
    num_parameters: int, settings: Mapping[str, Any], num_ranks: int, has_moments: bool, passes: Footprint
) -> dict[str, int]:
    """Bytes of one rank of a training, by what they are for.

    Weights and gradients in float32, or in 16 bits with a float32 copy where ``settings`` say so; ZeRO cuts Adam's two
    moments and the copy over the ranks from stage 1 on, gradients from stage 2, weights from stage 3 (Rajbhandari et
    al., arXiv 1910.02054). Buckets are those of the settings, or DeepSpeed's defaults, each at its full size.

    Args:
        num_parameters: N.
        settings: DeepSpeed JSON.
        num_ranks: data-parallel ranks.
        has_moments: of the optimizer: two numbers a parameter.
        passes: forward and backward of one micro-batch.
    """
    zero = settings.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    narrow = any(settings.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
    width, part = (2 if narrow else _FLOAT), num_parameters / num_ranks
    weights: float = width * (part if stage == 3 else num_parameters)
    # DeepSpeed steps on a flat copy of its part, in float32, whether the weights are narrow or not.
    copy = 0.0 if stage == 0 and not narrow else _FLOAT * (part if stage else num_parameters)
    gradients = width * (part if stage >= 2 else num_parameters) + copy  # a step has a flat copy of them as well
    bucket = _number(zero, "reduce_bucket_size", _BUCKET)
    if stage == 0:
        buffers = width * min(bucket, num_parameters) * (num_ranks > 1)
    else:
        buffers = width * bucket * (2 if zero.get("overlap_comm", stage == 3) else 1)
    if stage == 3:
        live = max(
            _number(zero, "stage3_max_live_parameters", _LIVE),
            _number(zero, "stage3_prefetch_bucket_size", _PREFETCHED),
        )
        buffers += width * min(live, num_parameters)
    return {
        "weights": round(weights + copy),
        "gradient": round(gradients),
        "optimizer": round(2 * _FLOAT * (part if stage else num_parameters)) if has_moments else 0,
        "passes": passes.peak_bytes,
        "buffers": round(buffers),
    }


def _number(zero: Mapping[str, Any], key: str, default: int) -> float:
    """A number of the settings; "auto" is the default."""
    value = zero.get(key, default)
    return float(default if isinstance(value, str) else value)
