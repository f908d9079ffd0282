"""The same chain on a CUDA device and on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_run import subjects_of, tiny_config

from patterning_dist.sampling.direction import directional_losses, response_direction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture
def studies(tiny_run):
    # Few steps: rounding differs between devices, and a chain carries it on.
    config = tiny_config(tiny_run, "sampling.num_draws=8")
    return {device: subjects_of(config, tiny_run, device) for device in ("cpu", "cuda")}


@pytest.mark.parametrize("component", ["layer.0.head.1", "everything"])
def test_chains_agree(studies, component):
    chains = {device: study.chain(component, 1) for device, study in studies.items()}
    np.testing.assert_allclose(chains["cuda"].center_losses, chains["cpu"].center_losses, rtol=1e-5, atol=1e-5)
    pairs = list(zip(chains["cuda"].draws(), chains["cpu"].draws(), strict=True))
    assert len(pairs) == 8
    for gpu, cpu in pairs:
        np.testing.assert_allclose(gpu.losses, cpu.losses, atol=1e-4)
        np.testing.assert_allclose(gpu.observables, cpu.observables, atol=1e-4)
        assert np.abs(cpu.losses).max() > 3e-3  # far above the tolerance, so that agreement says something
    assert all(w.is_cuda for w in chains["cuda"].state.position.values())
    if component == "everything":
        cpu, cuda = (chains[device].statistics["gradients"].sums for device in ("cpu", "cuda"))
        scale = cpu.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(cuda / scale, cpu / scale, rtol=0, atol=1e-3)


def test_response_directions_agree(studies):
    directions, scores = [], []
    for study in studies.values():
        target = study.target("everything")
        gradient = target.split_gradients()[0]
        batch = target.prepare(study.source("everything", "pool"), study.hessian_ids(8))
        solution = response_direction(
            target, study.posterior("everything"), gradient, batch, max_iterations=8, tolerance=1e-4
        )
        directions.append(torch.cat([v.cpu().flatten() for v in solution.vector.values()]))
        scores.append(directional_losses(target, batch, target.center, solution.vector, step=0.01))
    cpu, cuda = directions
    assert (cpu - cuda).norm() < 1e-3 * cpu.norm()
    assert np.corrcoef(scores[0].flatten(), scores[1].flatten())[0, 1] > 0.999
