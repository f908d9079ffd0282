"""What stage predict takes: walks of windows, from gradients, Hessian products and evaluations that were timed."""

from __future__ import annotations

from patterning_dist.config.window import without_window
from patterning_dist.response.cost import NOTHING, Seconds, makespan
from patterning_dist.stages.plan.sampling import Chains
from patterning_dist.stages.plan.table import StagePlan
from patterning_dist.stages.windows import plain_subject, window_of
from patterning_dist.training.walk import NUM_SPREAD


def plan_predict(chains: Chains) -> StagePlan:
    """Stage predict: a walk for every weighted arm with a window, and one for every checkpoint that they start from."""
    config, probe = chains.config, chains.probe
    assert config.retrain is not None
    arms = [a for a in config.retrain.arm_list if a.weights is not None and without_window(config, a) is None]
    number = len(arms) + len({plain_subject(config, arm)[0] for arm in arms})
    settings = config.predict
    assert settings is not None
    window = window_of(config, config.retrain.arm_list[0])  # all are walked in as many segments
    products = (window.num_segments + NUM_SPREAD) * settings.lanczos_steps
    return StagePlan(
        "predict",
        f"{number} walks of {window.num_segments * window.num_batches:,} gradients and {products:,} curvature products",
        walk_seconds(chains, number),
        min(number, probe.num_workers) * config.sampling.ranks_per_chain,
        config.sampling.threads_per_worker,
        on_device=True,
        process_bytes=probe.process_bytes if number else None,
    )


def walk_seconds(chains: Chains, number: int) -> Seconds:
    """Wall time of so many walks on the workers of chains."""
    times, config = chains.probe.window, chains.config
    if times is None or not number:
        return NOTHING
    assert config.retrain is not None
    window, settings = window_of(config, config.retrain.arm_list[0]), config.predict
    assert settings is not None
    gradients, products = window.num_segments * window.num_batches, window.num_segments + NUM_SPREAD
    walk = times.opening + times.gradient * gradients + times.product * (products * settings.lanczos_steps)
    walk += times.evaluation * (2 + NUM_SPREAD)
    return chains.probe.starting + makespan([walk] * number, chains.probe.num_workers)
