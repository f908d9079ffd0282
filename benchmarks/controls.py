"""What is a control of chi worth: variance, cost and bias of controlled estimates beside the plain covariance.

The classifier of `examples/digits.py` (2,410 weights, 1,400 training samples), all of it free; phi is the loss on
eights that were not trained on. The chains are the same with every control: only what is made of their draws differs.
Variance is that of one chain's chi, mean over the samples; the gain is the ratio of variance times CPU seconds, plain
to controlled. Size is the slope on the plain covariance of long careful chains, with full gradients and a quarter of
the step: above 1 by what steps and minibatches heat the estimate.

    OMP_NUM_THREADS=1 python benchmarks/controls.py [--chains 16] [--draws 40] [--reference 400]
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

from patterning_dist import Posterior, sample_chains
from patterning_dist.response.susceptibility import susceptibility

POSTERIOR, STEP_SIZE, SPACING = Posterior(300.0, 100.0), 1e-3, 10
GRADIENTS = (("minibatch", 32), ("control_variate", 32), ("full", 1400))


def measured(control: str | None, seed: int, **settings: Any) -> tuple[np.ndarray, float]:
    """chi of every chain [chain, sample], and CPU seconds of a chain."""
    started = time.process_time()
    found = sample_chains(
        build(), per_sample_loss, train, train, posterior=POSTERIOR, steps_between_draws=SPACING, burn_in=200,
        observables={"eights": loss_on_eights}, controlled=control and {"eights": control}, seed=seed, **settings,
    )  # fmt: skip
    seconds = (time.process_time() - started) / settings["num_chains"]
    result, row = (susceptibility(found.controlled), 0) if control else (susceptibility(found.chains), 1)
    return result.chi_per_chain[:, row], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--reference", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    careful = {"step_size": STEP_SIZE / 4, "gradient": "full", "num_draws": options.reference, "num_chains": 8}
    chi, _ = measured(None, 1000, **careful)
    truth, noise = chi.mean(axis=0), float(chi.var(axis=0, ddof=1).mean() / len(chi))
    size = float(np.mean(truth**2)) - noise
    print(f"reference: noise is {noise / size:.1%} of the mean square of chi", flush=True)
    for gradient, batch_size in GRADIENTS:
        print(f"{gradient}, {batch_size} samples")
        for control in (None, "langevin_stein", "linear"):
            how = {"step_size": STEP_SIZE, "gradient": gradient, "batch_size": batch_size, "num_draws": options.draws}
            chi, seconds = measured(control, 0, num_chains=options.chains, **how)
            variance, mean = float(chi.var(axis=0, ddof=1).mean()), chi.mean(axis=0)
            if control is None:
                plain = (variance, seconds)
            scale = float(mean @ truth) / len(truth) / size  # its noise is independent of the truth's
            gain, share = plain[0] * plain[1] / (variance * seconds), variance / plain[0]
            print(f"  {control or 'plain':<15} {seconds:5.2f} s a chain, variance / plain {share:.3f}, gain {gain:.2f},"
                  f" size / true {scale:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
