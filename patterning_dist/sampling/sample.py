"""Posterior chains of any module from Python, one after another in this process: no files, no Ray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.response.moments import CoMoments
from patterning_dist.sampling.chain import Chain, ChainFailure, ChainSettings, Gradient
from patterning_dist.sampling.controlled import Control, Controlled
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.samples import PerSampleLoss, Samples
from patterning_dist.sampling.statistics import Statistic
from patterning_dist.sampling.target import Target

COMPONENT_LOSS = "component_loss"
_CONTROLLED = "controlled observables"  # among the statistics of a chain


@dataclass(frozen=True)
class Sampled:
    """What the chains left behind: deviations from the checkpoint w*, of the healthy chains.

    Attributes:
        chains: co-moments of observables and probe losses, for ``susceptibility``.
        controlled: likewise, of the observables in ``controlled`` and nothing else.
        losses: L(w) - L(w*) over the probe, for ``llc`` [chain, draw].
        traces: every observable's draws [chain, draw, observable].
        observable_names: ``component_loss``, then those that were given.
        center_losses: l_i(w*) [probe column], nats.
        excluded: number of a failed chain -> what happened.
        temperatures: virial temperature of blocks of steps after burn-in, for ``trace_mean`` [chain, block]; 1 for the
            posterior, see ``sampling.temperature``.
        step_biases: what steps and minibatches add to the LLC, nats, likewise; not of ``sgnht``.
        stiff_temperatures: ``temperatures`` along the stiffest directions alone, where ``lanczos_steps`` are taken.
        statistics: results of the ``Statistic`` of each name, one a chain.
    """

    chains: list[CoMoments]
    controlled: list[CoMoments]
    losses: np.ndarray
    traces: np.ndarray
    observable_names: list[str]
    center_losses: np.ndarray
    excluded: dict[int, str]
    temperatures: np.ndarray
    step_biases: np.ndarray
    stiff_temperatures: np.ndarray
    statistics: dict[str, list[dict[str, np.ndarray] | None]]


def sample_chains(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    data: Samples,
    probe: Samples,
    *,
    posterior: Posterior,
    step_size: float,
    num_draws: int,
    component: str = "everything",
    observables: Mapping[str, Callable[[nn.Module], Tensor]] | None = None,
    num_chains: int = 4,
    burn_in: int = 0,
    steps_between_draws: int = 1,
    batch_size: int = 32,
    num_batches: int = 8,
    micro_batch_size: int = 1024,
    sampler: Sampler | None = None,
    gradient: Gradient = "minibatch",
    lanczos_steps: int = 0,
    weight_decay: float = 0.0,
    controlled: Mapping[str, Control] | None = None,
    statistics: Mapping[str, Callable[[Target], Statistic]] | None = None,
    seed: int = 0,
) -> Sampled:
    """Draws from p_C(w) ~ exp( -n_beta L(w) - gamma/2 |w - w*|^2 ), Lau et al. (arXiv 2308.12108), reduced to moments.

    Args:
        model: at w*, float32; it is copied, and sampled in ``eval()`` mode.
        per_sample_loss: (model, batch) -> losses [sample] or [sample, position] in nats, differentiable.
        data: training samples, with ``len()`` and ``[ids]`` -> batch; a ``TensorDataset`` does.
        probe: samples whose losses are recorded at every draw.
        posterior: n_beta and gamma.
        step_size: eps [weight^2].
        num_draws: draws of every chain.
        component: what may move: ``everything``, or patterns of parameter names, ``0.weight[0:16,:]+0.bias``.
        observables: name -> function of the model that gives one number.
        num_chains: independent chains, numbered from 0.
        burn_in: steps before the first draw.
        steps_between_draws: steps from one draw to the next.
        batch_size: samples of a minibatch, drawn without replacement.
        num_batches: batch means per chain, for the standard errors; even.
        micro_batch_size: samples of one forward pass at most.
        sampler: the update rule; default: SGLD.
        gradient: ``minibatch``, ``control_variate`` (twice the work a step, far less noise) or ``full``; see
            ``ChainSettings``.
        lanczos_steps: Hessian products from which every chain takes the stiffest directions; 10 do, 0 for none.
        weight_decay: c, where w* is the minimum of L(w) + c/2 |w|^2: L is then that sum, in the posterior and the LLC.
        controlled: differentiable observable -> control that takes most of the noise out of its susceptibilities:
            ``langevin_stein``, exact, or ``linear``; see ``sampling.controlled``.
        statistics: name -> what makes a ``Statistic`` of a chain's target; see ``Sampled.statistics``.
        seed: all random numbers follow from it, the component's name and the chain's number.

    Raises:
        PatterningError: no such component, losses of a wrong shape, a controlled observable that is not there or has no
            gradient, or no chain that came through.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> from patterning_dist import Posterior, sample_chains
        >>> model, data = torch.nn.Linear(1, 1, bias=False), TensorDataset(torch.ones(64, 1))
        >>> _ = torch.nn.init.zeros_(model.weight)  # w* = 0, where L = w^2 is least
        >>> square, posterior = lambda model, batch: model(batch[0])[:, 0] ** 2, Posterior(100.0, 1.0)
        >>> found = sample_chains(model, square, data, data, posterior=posterior, step_size=1e-3, num_draws=50)
        >>> found.losses.shape, bool((found.losses >= 0).all())  # L(w) - L(w*) [chain, draw], for `llc`
        ((4, 50), True)
    """
    model, functions = copy.deepcopy(model), observables or {}
    target = Target(
        model,
        select_component(model, component),
        per_sample_loss,
        data,
        probe,
        functions=tuple(functions.values()),
        num_component_losses=1,
        weight_decay=weight_decay,
        micro_batch_size=micro_batch_size,
    )
    settings = ChainSettings(
        posterior=posterior,
        step_size=step_size,
        batch_size=batch_size,
        burn_in=burn_in,
        num_draws=num_draws,
        steps_between_draws=steps_between_draws,
        seed=seed,
        sampler=sampler or Sampler(),
        gradient=gradient,
        lanczos_steps=lanczos_steps,
    )
    names = [COMPONENT_LOSS, *functions]
    if missing := [name for name in controlled or {} if name not in functions]:
        raise PatterningError(f"controlled: '{missing[0]}' is not among the observables {list(functions)}; name those")
    controls = [(names.index(name), control) for name, control in (controlled or {}).items()]
    chains, traces, heat, excluded = [], [], [], {}
    results: dict[str, list[dict[str, np.ndarray] | None]] = {name: [] for name in statistics or {}}
    of_controls: list[CoMoments] = []
    for number in range(num_chains):
        target.move_to(target.center)
        own = {name: make(target) for name, make in (statistics or {}).items()}
        if controls:
            options: dict[str, Any] = {"population": len(data), "controls": controls, "num_batches": num_batches}
            own[_CONTROLLED] = Controlled(target, settings, number, **options)
        chain = Chain(target, settings, number, population=len(data), statistics=own)
        moments = CoMoments.empty(number, num_draws, len(names), len(chain.center_losses), num_batches)
        rows = []
        try:
            for draw in chain.draws():
                moments.update(draw.observables[None], draw.losses[None])
                rows.append([draw.mean_loss, *draw.observables])
        except ChainFailure as failure:
            excluded[number] = str(failure)
        else:
            chains.append(moments)
            traces.append(rows)
            heat.append(chain.temperatures())
            found = {name: statistic.result() for name, statistic in own.items()}
            if (products := found.pop(_CONTROLLED, None)) is not None:
                of_controls.append(CoMoments.from_state_dict(products).columns(slice(-1)))
            for name, result in found.items():
                results[name].append(result)
    if not chains:
        raise PatterningError(f"none of {num_chains} chains came through; chain 0: {excluded[0]}")
    stacked, (temperatures, biases, stiff) = np.array(traces), (np.array(blocks) for blocks in zip(*heat, strict=True))
    return Sampled(
        chains=chains,
        controlled=of_controls,
        losses=stacked[:, :, 0],
        traces=stacked[:, :, 1:],
        observable_names=names,
        center_losses=chain.center_losses,
        excluded=excluded,
        temperatures=temperatures,
        step_biases=biases,
        stiff_temperatures=stiff,
        statistics=results,
    )
