"""Which gradient gives LLC and chi the smallest error for its CPU time: a minibatch's, a controlled one, or the full?

The classifier of `examples/digits.py` (2,410 weights, 1,400 training samples), all of it free. Every kind of gradient,
at two step sizes, gets the same CPU seconds a repetition, burn-in included; errors are against long chains with the
full gradient at a quarter of the smaller step. Mean squared errors are relative: of the LLC to its square, of chi to
the mean square of the reference's chi over samples, less the reference's own variance.

    OMP_NUM_THREADS=1 python benchmarks/gradients.py [--seconds 4] [--repetitions 4] [--reference 120]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import build, loss_on_eights, per_sample_loss, train

from patterning_dist import Posterior, llc, sample_chains, susceptibility
from patterning_dist.models.components import select_component
from patterning_dist.sampling.lanczos import spectrum_ends
from patterning_dist.sampling.target import Target

POSTERIOR = Posterior(300.0, 100.0)
KINDS = [("minibatch", 8), ("minibatch", 64), ("control_variate", 8), ("control_variate", 64), ("full", 1400)]
SHARES = (0.4, 0.1)  # eps times the largest precision
SPACING, CHAINS = 10, 2


def chains(step_size: float, gradient: str, batch_size: int, num_draws: int, seed: int) -> Any:
    """Chains with a burn-in of a quarter of their steps."""
    return sample_chains(
        build(), per_sample_loss, train, train, posterior=POSTERIOR, step_size=step_size, num_draws=num_draws,
        steps_between_draws=SPACING, burn_in=num_draws * SPACING // 4, num_chains=CHAINS, batch_size=batch_size,
        gradient=gradient, observables={"eights": loss_on_eights}, seed=seed,
    )  # fmt: skip


def draws_within(seconds: float, *how: Any) -> int:
    """Draws of every chain that so many CPU seconds allow."""
    spent = []
    for num_draws in (8, 24):
        started = time.process_time()
        chains(*how, num_draws, seed=99)
        spent.append(time.process_time() - started)
    per_draw = (spent[1] - spent[0]) / 16
    return max(8, int((seconds - spent[0] + 8 * per_draw) / per_draw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--reference", type=float, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)

    model = build()
    target = Target(model, select_component(model, "everything"), per_sample_loss, train, train)
    ends, _ = spectrum_ends(target, POSTERIOR, target.prepare(train), 20, seed=0)
    print(f"precisions {ends.smallest:.4g} to {ends.largest:.4g}")
    careful = (min(SHARES) / 4 / ends.largest, "full", 1)
    num_draws = draws_within(options.reference, *careful)
    reference = chains(*careful, num_draws, seed=1000)
    coefficient, truth = llc(reference.losses, POSTERIOR.inverse_temperature), susceptibility(reference.chains)
    noise = np.mean(truth.standard_error**2, axis=1)
    size = np.mean(truth.chi**2, axis=1) - noise
    print(f"reference, {num_draws} draws: LLC {coefficient.value:.4g} +- {coefficient.standard_error:.2g}, chi to "
          f"{np.sqrt(noise / size)} of its size")  # fmt: skip
    for gradient, batch_size in KINDS:
        for share in SHARES:
            how = (share / ends.largest, gradient, batch_size)
            num_draws, off, of_chi = draws_within(options.seconds, *how), [], []
            for seed in range(options.repetitions):
                found = chains(*how, num_draws, seed)
                measured = llc(found.losses, POSTERIOR.inverse_temperature).value
                off.append(measured / coefficient.value - 1)
                error = np.mean((susceptibility(found.chains).chi - truth.chi) ** 2, axis=1)
                of_chi.append((error - noise) / size)
            errors = np.std(of_chi, axis=0, ddof=1) / options.repetitions**0.5
            chi = ", ".join(f"{m:.3f} +- {e:.3f}" for m, e in zip(np.mean(of_chi, axis=0), errors, strict=True))
            print(f"{gradient} {batch_size}, eps P {share:g}: {num_draws:5} draws, LLC off {np.mean(off):+.4f}, "
                  f"its mse {np.mean(np.square(off)):.2e}, mse of chi (loss, eights) {chi}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
