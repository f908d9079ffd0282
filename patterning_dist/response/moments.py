"""Streaming co-moments of one chain: what a chain leaves behind instead of its draws.

Axes: `phi` is [draw, observable], `losses` is [draw, probe]; batched arrays have a leading `batch` axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patterning_dist.errors import PatterningError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Centred first and second moments of a set of draws (sums, not yet divided by the count)."""

    count: int
    mean_phi: Floats  # observable
    mean_loss: Floats  # probe
    m2_phi: Floats  # observable: sum of squared deviations
    m2_loss: Floats  # probe
    comoment: Floats  # observable probe: sum of products of deviations


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the union: C = C_a + C_b + (n_a n_b / n) d_phi d_loss^T, mean = mean_a + (n_b / n) d.

    Source: Chan, Golub & LeVeque (1983). `a` and `b` have the same observables and probes; neither is
    changed.
    """
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    count = a.count + b.count
    delta_phi, delta_loss = b.mean_phi - a.mean_phi, b.mean_loss - a.mean_loss
    fraction, weight = b.count / count, a.count * b.count / count
    return Moments(
        count,
        a.mean_phi + fraction * delta_phi,
        a.mean_loss + fraction * delta_loss,
        a.m2_phi + b.m2_phi + weight * delta_phi**2,
        a.m2_loss + b.m2_loss + weight * delta_loss**2,
        a.comoment + b.comoment + np.outer(weight * delta_phi, delta_loss),
    )


def _two_pass(phi: Floats, losses: Floats) -> Moments:
    mean_phi, mean_loss = phi.mean(axis=0), losses.mean(axis=0)
    phi, losses = phi - mean_phi, losses - mean_loss
    m2_phi, m2_loss = np.einsum("tk,tk->k", phi, phi), np.einsum("tm,tm->m", losses, losses)
    return Moments(len(phi), mean_phi, mean_loss, m2_phi, m2_loss, phi.T @ losses)


@dataclass
class CoMoments:
    """Co-moments of one chain in contiguous batches of its planned draws: draw t of T is in batch floor(t B /
    T).

    Memory is O(batch * observable * probe) float64 whatever the number of draws. Feed deviations from the
    value at the centre w*, so that float32 inputs keep their precision (Chan, Golub & LeVeque 1983).

    Examples:
        >>> from patterning_dist import CoMoments
        >>> chain = CoMoments.empty(chain=0, num_draws=4, num_observables=1, num_probes=2, num_batches=2)
        >>> chain.update([[-1.0], [1.0], [-1.0], [1.0]], [[-0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, -0.5]])
        >>> chain.total().comoment / chain.num_recorded  # Cov(phi, l_i): l_0 rises with phi, l_1 falls
        array([[ 0.5, -0.5]])
    """

    chain: int
    num_draws: int  # planned
    count: NDArray[np.int64]  # batch
    mean_phi: Floats  # batch observable
    mean_loss: Floats  # batch probe
    m2_phi: Floats  # batch observable
    m2_loss: Floats  # batch probe
    comoment: Floats  # batch observable probe

    @classmethod
    def empty(
        cls, chain: int, num_draws: int, num_observables: int, num_probes: int, num_batches: int = 16
    ) -> CoMoments:
        """Moments before the first draw.

        `num_batches` must be even (for `halves`) and at most `num_draws`; PatterningError otherwise.
        """
        if num_batches < 2 or num_batches % 2 or num_batches > num_draws:
            raise PatterningError(
                f"chain {chain}: {num_batches} batches for {num_draws} draws: the number of batches must be "
                "even, at least 2 and at most the number of draws; plan more draws or fewer batches"
            )
        phi, loss = (num_batches, num_observables), (num_batches, num_probes)
        return cls(
            chain,
            num_draws,
            np.zeros(num_batches, np.int64),
            np.zeros(phi),
            np.zeros(loss),
            np.zeros(phi),
            np.zeros(loss),
            np.zeros((*phi, num_probes)),
        )

    @property
    def num_recorded(self) -> int:
        """Draws taken in so far."""
        return int(self.count.sum())

    def update(self, phi: ArrayLike, losses: ArrayLike) -> None:
        """Take in a block of consecutive draws, phi [draw, observable] and losses [draw, probe], as
        deviations.

        float32 or float64 in, float64 inside. Raises PatterningError, with the moments unchanged, for wrong
        shapes, for more draws than planned, and for an entry that is not finite (naming chain and draw).
        """
        phi, losses = np.asarray(phi, np.float64), np.asarray(losses, np.float64)
        wanted = (self.mean_phi.shape[1], self.mean_loss.shape[1])
        if phi.ndim != 2 or losses.ndim != 2 or len(phi) != len(losses) or (phi.shape[1], losses.shape[1]) != wanted:
            raise PatterningError(
                f"chain {self.chain}: got phi {phi.shape} and losses {losses.shape}, expected "
                f"[draw, {wanted[0]}] and [draw, {wanted[1]}] with as many draws in both"
            )
        first = self.num_recorded
        if first + len(phi) > self.num_draws:
            raise PatterningError(
                f"chain {self.chain}: draw {first + len(phi) - 1} is past the {self.num_draws} planned "
                "draws; a block was sent twice or num_draws is too small"
            )
        for name, values in (("observable", phi), ("probe loss", losses)):
            finite = np.isfinite(values)
            if not finite.all():
                draw, entry = np.argwhere(~finite)[0]
                raise PatterningError(
                    f"chain {self.chain}, draw {first + draw}: {name} {entry} is {values[draw, entry]}, "
                    "expected a finite number; leave the chain out or lower step_size"
                )
        batches = (first + np.arange(len(phi))) * len(self.count) // self.num_draws
        for batch in np.unique(batches):
            rows = batches == batch
            self._set(batch, merge_moments(self.batch(batch), _two_pass(phi[rows], losses[rows])))

    def batch(self, index: int) -> Moments:
        """The moments of one batch (views, not copies)."""
        return Moments(
            int(self.count[index]),
            self.mean_phi[index],
            self.mean_loss[index],
            self.m2_phi[index],
            self.m2_loss[index],
            self.comoment[index],
        )

    def columns(self, which: slice | NDArray[np.int64]) -> CoMoments:
        """The moments of some of the probe columns."""
        mean_loss, m2_loss, comoment = (x[..., which] for x in (self.mean_loss, self.m2_loss, self.comoment))
        return replace(self, mean_loss=mean_loss, m2_loss=m2_loss, comoment=comoment)

    def averaged(self, shares: ArrayLike) -> CoMoments:
        """The moments of means over probe columns; what they do not follow for, ``m2_loss``, is NaN.

        shares: [probe mean], how much of a column is in every mean.
        """
        mean_loss, comoment = self.mean_loss @ np.asarray(shares), self.comoment @ np.asarray(shares)
        return replace(self, mean_loss=mean_loss, m2_loss=np.full_like(mean_loss, np.nan), comoment=comoment)

    def _set(self, index: int, moments: Moments) -> None:
        self.count[index] = moments.count
        self.mean_phi[index], self.mean_loss[index] = moments.mean_phi, moments.mean_loss
        self.m2_phi[index], self.m2_loss[index] = moments.m2_phi, moments.m2_loss
        self.comoment[index] = moments.comoment

    def _merged(self, start: int, stop: int) -> Moments:
        merged = self.batch(start)
        for index in range(start + 1, stop):
            merged = merge_moments(merged, self.batch(index))
        return merged

    def total(self) -> Moments:
        """Moments of all draws so far."""
        return self._merged(0, len(self.count))

    def halves(self) -> tuple[Moments, Moments]:
        """Moments of the draws t < T/2 and of the others, T planned draws."""
        middle = len(self.count) // 2
        return self._merged(0, middle), self._merged(middle, len(self.count))

    def state_dict(self) -> dict[str, NDArray]:
        """Plain arrays, for np.savez. Probe columns are the last axis of mean_loss, m2_loss and comoment."""
        return {name: np.array(value) for name, value in vars(self).items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, NDArray]) -> CoMoments:
        """The inverse of `state_dict`; PatterningError if a key is missing."""
        names = list(cls.__dataclass_fields__)
        missing = [name for name in names if name not in state]
        if missing:
            raise PatterningError(f"co-moments: key {missing[0]!r} is missing, expected {names}; sample again")
        arrays = {name: np.array(state[name]) for name in names if name not in ("chain", "num_draws")}
        return cls(chain=int(state["chain"]), num_draws=int(state["num_draws"]), **arrays)


def healthy_chains(chains: Sequence[CoMoments]) -> tuple[list[CoMoments], dict[int, str]]:
    """Chains with all their planned draws and finite moments, and chain -> reason for the others.

    Examples:
        >>> from patterning_dist import CoMoments
        >>> chain = CoMoments.empty(chain=3, num_draws=4, num_observables=1, num_probes=1, num_batches=2)
        >>> chain.update(phi=[[0.0], [1.0]], losses=[[0.0], [1.0]])
        >>> healthy_chains([chain])
        ([], {3: '2 of 4 draws recorded'})
    """
    healthy, excluded = [], {}
    for moments in chains:
        arrays = (moments.mean_phi, moments.mean_loss, moments.m2_phi, moments.m2_loss, moments.comoment)
        if moments.num_recorded != moments.num_draws:
            excluded[moments.chain] = f"{moments.num_recorded} of {moments.num_draws} draws recorded"
        elif not all(np.isfinite(array).all() for array in arrays):
            excluded[moments.chain] = "moments are not finite"
        else:
            healthy.append(moments)
    return healthy, excluded
