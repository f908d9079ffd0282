"""Susceptibilities with Monte-Carlo errors, from the co-moments of healthy chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patterning_dist.errors import PatterningError
from patterning_dist.response.batch_means import (
    BatchMean,
    batch_mean,
    covariance_of_means,
    degrees_of_freedom,
    paired,
    product_mean,
    skewed_interval,
)
from patterning_dist.response.moments import CoMoments, Floats, Moments, merge_moments

Baseline = Literal["restricted", "full"]


@dataclass(frozen=True)
class Susceptibility:
    """chi and its standard errors, in units of the observable times nats."""

    chi: Floats  # observable probe
    standard_error: Floats  # observable probe: the larger of the two below
    standard_error_batch: Floats  # observable probe: batch means inside chains
    standard_error_between: Floats  # observable probe: spread between chains, NaN with one chain
    degrees_of_freedom: Floats  # observable probe: of the standard error
    skewness: Floats  # observable probe: of the batch means about those of their chains
    num_batches: int  # of all chains
    chi_per_chain: Floats  # chain observable probe
    chains: tuple[int, ...]
    baseline: str
    excluded: Mapping[int, str] = field(default_factory=dict)  # chain -> reason

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """chi -+ t * standard error, wider where the draws are skewed (``skewed_interval``), for each entry alone.

        [observable probe], twice. Few chains know their own spread badly, so Student's t is taken instead of 1.96. In
        simulations of 2 to 8 chains with 16 to 100 independent draws a 95 % interval covers 97-98 % where draws are
        normal, 96-97 % where they are squares of normal ones and 89-94 % where they are log-normal, the least with two
        chains; of 7 autocorrelation times a chain, less.

        Examples:
            >>> from patterning_dist import CoMoments, susceptibility
            >>> chains = [CoMoments.empty(chain, num_draws=400, num_observables=1, num_probes=2) for chain in range(4)]
            >>> for chain in chains:
            ...     phi, noise = np.random.default_rng(chain.chain).normal(size=(2, 400, 1))
            ...     chain.update(phi, (phi + noise) * [0.3, -0.3])
            >>> low, high = susceptibility(chains).interval()
            >>> (low < [-0.3, 0.3]) & ([-0.3, 0.3] < high)  # what it is of infinitely many draws, -Cov(phi, l_i - L)
            array([[ True,  True]])
        """
        return skewed_interval(
            self.chi, self.standard_error, self.degrees_of_freedom, self.skewness, self.num_batches, level
        )


def susceptibility(
    chains: Sequence[CoMoments],
    *,
    loss_weights: ArrayLike | None = None,
    baseline: Baseline = "restricted",
    full: Sequence[CoMoments] | None = None,
    min_chains: int = 1,
    excluded: Mapping[int, str] | None = None,
) -> Susceptibility:
    """chi_i = -Cov(phi, l_i - L), Wang & Murfet 2601.13548; or with two posteriors, Baker et al. 2504.18274.

    `restricted`: covariance per chain about the chain's own means, plus the covariance of those means by
    batches (which makes up for what centring took away; 1/(T-1) would do so for independent draws only), then
    the plain mean over chains.
    `full`: -( E_C[phi (l_i - L)] - E_C[phi] E_full[l_i - L] ), every E a plain mean over chains and draws;
    `full` holds the chains of the unrestricted posterior (on the same probe columns), and may be `chains`
    itself. Feeding l_i as a deviation from l_i(w*) changes neither: the constant leaves E_C[phi l_i] -
    E_C[phi] E_full[l_i]. A constant in phi does change `full`, so phi must be phi(w) - phi(w*) there, as
    Baker et al. have it.

    L = sum_m w_m l_m with w = `loss_weights` [probe] normalised to sum 1 (default: uniform); give 0 to
    columns that are not to be averaged. If w is uniform over a set of columns, every row of chi sums to zero
    over that set. Standard errors: batch means inside chains, and the spread between chains over
    sqrt(chains); the larger, entry by entry. 95 % intervals are `Susceptibility.interval()`. Both bear on
    Monte-Carlo noise: where chains have not mixed (see R-hat), chi is that of the places they saw.

    Raises PatterningError with fewer than `min_chains` chains (naming `excluded`, chain -> reason), for
    chains of unlike shapes, fewer than two draws, and weights that are negative, all zero or of another
    length.

    Examples:
        >>> from patterning_dist import CoMoments, susceptibility
        >>> chain = CoMoments.empty(chain=0, num_draws=160, num_observables=1, num_probes=2)
        >>> phi = np.tile([[-1.0], [1.0]], (80, 1))  # variance 1
        >>> chain.update(phi, phi * [0.3, -0.3])
        >>> susceptibility([chain]).chi.round(3)  # the loss of sample 0 goes with phi: weighting it up lowers phi
        array([[-0.3,  0.3]])
    """
    if baseline not in ("restricted", "full"):
        raise PatterningError(f"baseline: got {baseline!r}, expected 'restricted' or 'full'")
    if baseline == "full" and not full:
        raise PatterningError("baseline: 'full' needs the chains of the whole model; sample component 'everything'")
    check_chains(chains, min_chains, excluded, full or ())
    weights = normalised(loss_weights, chains[0].mean_loss.shape[1])

    if baseline == "restricted":
        parts = [_restricted(moments, weights) for moments in chains]
        return combine_chains(chains, parts, excluded=excluded)

    assert full is not None
    pooled_mean = _pooled(full).mean_loss
    mean_phi = _pooled(chains).mean_phi
    # Chains that serve as their own baseline are centred in phi as well: the sum is the same, and the
    # baseline's noise then cancels where it should instead of being counted as if it were independent.
    same = len(full) == len(chains) and all(a is b for a, b in zip(full, chains, strict=True))
    center = mean_phi if same else np.zeros_like(mean_phi)
    parts = []
    for moments in chains:
        found = batch_mean(moments, lambda part: contrast(product_mean(part, center, pooled_mean), weights)).negated()
        parts.append((found.mean, found))
    return combine_chains(
        chains,
        parts,
        shares=np.array([moments.num_recorded for moments in chains], np.float64),
        baseline="full",
        baseline_variance=0.0 if same else mean_phi[:, None] ** 2 * _mean_contrast_variance(full, weights),
        excluded=excluded,
    )


def _restricted(moments: CoMoments, weights: Floats) -> tuple[Floats, BatchMean]:
    """chi of one chain against its own mean loss, and how its batches spread."""
    total = moments.total()
    found = batch_mean(
        moments, lambda part: contrast(product_mean(part, total.mean_phi, total.mean_loss), weights)
    ).negated()
    return found.mean - contrast(covariance_of_means(moments), weights), found


def combine_chains(
    chains: Sequence[CoMoments],
    parts: Sequence[tuple[Floats, BatchMean]],
    *,
    shares: Floats | None = None,
    baseline: str = "restricted",
    baseline_variance: Floats | float = 0.0,
    excluded: Mapping[int, str] | None = None,
) -> Susceptibility:
    """The mean over chains with its errors, chi = sum_c s_c chi_c.

    parts: (chi_c, spread of the batches inside the chain) of every chain, each [observable probe]. `shares` [chain]
    are normalised to sum 1 (default: all alike); `baseline_variance` is added to the variances of chi.
    """
    shares = np.ones(len(chains)) if shares is None else shares
    shares = shares / shares.sum()
    chi_per_chain = np.stack([chi for chi, _ in parts])
    spreads = [spread for _, spread in parts]
    batch = sum(s**2 * spread.variance for s, spread in zip(shares, spreads, strict=True)) + baseline_variance
    num_batches = sum(spread.num_batches for spread in spreads)
    # k-statistics: deviations are from the mean of few batches of a chain, n, which leaves n - 1 of their squares and
    # (n - 1)(n - 2) / n of their cubes.
    squares = sum(s.num_batches / max(s.num_batches - 1, 1) * s.squares for s in spreads) / num_batches
    cubes = (
        sum(s.num_batches**2 / max((s.num_batches - 1) * (s.num_batches - 2), 1) * s.cubes for s in spreads)
        / num_batches
    )
    between = np.full_like(batch, np.nan)
    if len(chains) > 1:
        between = chi_per_chain.var(axis=0, ddof=1) / len(chains) + baseline_variance
    num_inside = sum(max(len(paired(moments)) - 1, 1) for moments in chains)
    return Susceptibility(
        chi=np.tensordot(shares, chi_per_chain, 1),
        standard_error=np.sqrt(np.fmax(batch, between)),
        standard_error_batch=np.sqrt(batch),
        standard_error_between=np.sqrt(between),
        degrees_of_freedom=degrees_of_freedom(batch, between, num_inside, len(chains)),
        skewness=np.where(squares > 0, cubes, 0.0) / np.where(squares > 0, squares, 1.0) ** 1.5,
        num_batches=num_batches,
        chi_per_chain=chi_per_chain,
        chains=tuple(moments.chain for moments in chains),
        baseline=baseline,
        excluded=dict(excluded or {}),
    )


def contrast(values: Floats, weights: Floats) -> Floats:
    """values of l_i -> values of l_i - L, L = sum_m w_m l_m; probe is the last axis."""
    return values - (values @ weights)[..., None]


def _mean_contrast_variance(chains: Sequence[CoMoments], weights: Floats) -> Floats:
    """Variance of the pooled mean of l_i - L: by batch means or between chains, the larger. [probe]"""
    total = sum(moments.num_recorded for moments in chains)
    batch: Floats | float = 0.0
    means = []
    for moments in chains:
        used = np.flatnonzero(moments.count)
        count = moments.count[used].astype(np.float64)
        values = contrast(moments.mean_loss[used], weights)
        means.append(count @ values / count.sum())
        scale = (len(used) - 1) * count.sum() or np.nan
        batch = batch + (count.sum() / total) ** 2 * (count @ (values - means[-1]) ** 2) / scale
    between = np.var(means, axis=0, ddof=1) / len(means) if len(means) > 1 else np.nan
    return np.fmax(batch, between)


def _pooled(chains: Sequence[CoMoments]) -> Moments:
    merged = chains[0].total()
    for moments in chains[1:]:
        merged = merge_moments(merged, moments.total())
    return merged


def check_chains(
    chains: Sequence[CoMoments],
    min_chains: int,
    excluded: Mapping[int, str] | None = None,
    full: Sequence[CoMoments] = (),
) -> None:
    """Raise PatterningError for fewer than `min_chains` chains, chains of unlike shapes, fewer than two draws."""
    if len(chains) < max(min_chains, 1):
        reasons = "; ".join(f"chain {chain} excluded: {reason}" for chain, reason in (excluded or {}).items())
        raise PatterningError(
            f"{len(chains)} healthy chains, expected at least {max(min_chains, 1)} (min_chains)"
            f"{': ' + reasons if reasons else ''}; mend what stopped them or lower min_chains"
        )
    observables, probes = chains[0].comoment.shape[1:]
    # Only the mean losses of the baseline's chains are used: their observables may be others.
    for moments, wanted in [*((m, observables) for m in chains), *((m, m.mean_phi.shape[1]) for m in full)]:
        got = (moments.mean_phi.shape[1], moments.mean_loss.shape[1])
        if got != (wanted, probes):
            raise PatterningError(
                f"chain {moments.chain}: {got[0]} observables and {got[1]} probe columns, expected "
                f"{wanted} and {probes} as in chain {chains[0].chain}; "
                "sample all chains with the same observables and probe set"
            )
        if moments.num_recorded < 2:
            raise PatterningError(
                f"chain {moments.chain}: {moments.num_recorded} draws, expected at least 2; sample it again"
            )


def normalised(weights: ArrayLike | None, num_probes: int) -> NDArray[np.float64]:
    """Weights of L that sum to 1, uniform by default; PatterningError if they are no weights. [probe]"""
    if weights is None:
        return np.full(num_probes, 1 / num_probes)
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_probes,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise PatterningError(
            f"loss_weights: expected {num_probes} finite weights >= 0 that are not all 0, one for each probe column"
        )
    return weights / weights.sum()
