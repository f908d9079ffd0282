"""First moments of the pool under a component's posterior, and which component it is where a pattern names several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patterning_dist.aggregation.files import read_chains
from patterning_dist.config import Config
from patterning_dist.config.controls import DrawsKind
from patterning_dist.progress import Progress
from patterning_dist.runtime.first_moments import Draws, pool_rises, probe_rises
from patterning_dist.runtime.pool import RunCalls
from patterning_dist.stages.scores import Pool, Scores, centred
from patterning_dist.storage.run import RunDirectory


def choose_subject(pool: Pool, names: Sequence[str], progress: Progress) -> tuple[str, dict[str, float]]:
    """The subject under whose draws the probe's mean loss rises most, and the rises of all, nats.

    The rule looks at no label: it knows nothing of what the component does. With one subject nothing is measured.

    Args:
        pool: of any of the subjects.
        names: of the subjects.
        progress: hears which one it is.
    """
    assert pool.config.solve is not None
    if len(names) == 1:
        return names[0], {}
    draws = [_draws(pool.config, pool.run, name, pool.config.solve.draws) for name in names]
    with pool.tasks(progress) as run_calls:
        found = probe_rises(run_calls, draws, len(pool.subjects.probe.ids))
    rises = dict(zip(names, found, strict=True))
    chosen = max(rises, key=lambda name: rises[name])
    progress.say(f"{chosen} of {len(names)} components: disturbed, it raises the loss most")
    return chosen, rises


def _draws(config: Config, run: RunDirectory, subject: str, source: DrawsKind) -> Draws:
    assert config.solve is not None
    if source == "antithetic":
        return Draws(run.storage, subject, num_pairs=config.solve.num_draws)
    healthy, _ = read_chains(run.path / "sampling" / subject)
    return Draws(run.storage, subject, chains=tuple(moments.chain for moments in healthy))


def first_moment_scores(pool: Pool, observables: list[str], progress: Progress) -> Scores:
    """The targets' scores from the draws of section solve; see ``moment_scores``."""
    assert pool.config.solve is not None
    with pool.tasks(progress) as run_calls:
        return moment_scores(run_calls, pool, pool.config.solve.draws, observables)


def moment_scores(run_calls: RunCalls, pool: Pool, source: DrawsKind, observables: list[str]) -> Scores:
    """m_i = <l_i - L> less its value at w* (see ``sampling.first_moment``) over the whole pool, nats.

    Errors come from the spread between chains, or pairs of draws, on a part of the pool.
    """
    draws = _draws(pool.config, pool.run, pool.subject, source)
    rises, subset = pool_rises(run_calls, draws, pool.num_samples, pool.subset)
    return Scores(
        [centred(rises)[None]],
        pool.in_subset,
        centred(subset)[:, None],
        observables,
        {"estimator": "first_moment", "mean_rise": float(rises.mean())},
        units="nats",
        replicates="chains" if draws.chains else "pairs of draws",
    )


def ablation_scores(run_calls: RunCalls, pool: Pool) -> np.ndarray:
    """Rise of every loss of the pool where the component is set to 0, less its mean [entry], nats."""
    return centred(pool_rises(run_calls, Draws(pool.run.storage, pool.subject), pool.num_samples, pool.subset)[0])
