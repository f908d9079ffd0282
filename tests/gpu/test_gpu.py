"""The same chain on a CUDA device and on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_run import tiny_config

from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.study import Study

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture
def studies(tiny_run):
    # Few steps: rounding differs between devices, and a chain carries it on.
    config = tiny_config(tiny_run, "sampling.num_draws=8")
    return {device: Study(config, tiny_run, device) for device in ("cpu", "cuda")}


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
        scale = chains["cpu"].sums.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(chains["cuda"].sums / scale, chains["cpu"].sums / scale, rtol=0, atol=1e-3)


def test_response_directions_agree(studies):
    directions, scores = [], []
    for device, study in studies.items():
        model = study.restricted("everything")
        held_out = model.freeze(study.splits.tokens.to(device))
        gradient = model.gradients(held_out, study.splits.coefficients.to(device))[0]
        batch = model.freeze(study.hessian_tokens())
        solution = response_direction(
            model, study.posterior("everything"), gradient, batch, max_iterations=8, tolerance=1e-4
        )
        directions.append(torch.cat([v.cpu().flatten() for v in solution.vector.values()]))
        scores.append(directional_losses(model, batch, model.center, solution.vector, step=0.01))
    cpu, cuda = directions
    assert (cpu - cuda).norm() < 1e-3 * cpu.norm()
    assert np.corrcoef(scores[0].flatten(), scores[1].flatten())[0, 1] > 0.999
