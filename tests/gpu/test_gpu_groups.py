"""Two ranks over NCCL are one chain, and a sharded model's gradients are those of the CPU."""

from __future__ import annotations

import chain_group_script as script
import numpy as np
import pytest
import torch

from patterning_dist.sampling.ranks import Ranks

pytestmark = pytest.mark.gpu
CASES = [*script.CASES, "bfloat16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a CUDA device for each of two ranks")
    # As in an actor: every rank sees its own device only.
    environments = [{"CUDA_VISIBLE_DEVICES": str(rank), "LOCAL_RANK": "0"} for rank in range(2)]
    return script.run_ranks(tmp_path_factory.mktemp("ranks"), "cuda", environments)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_over_nccl_are_one_chain(runs, case):
    before, after = (script.whole(runs, size, case, "noise") for size in (1, 2))
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    # As on the CPU, with room for sums whose order is not fixed.
    tolerances = {"gradient": 1e-2, "position": 1e-2} if case == "bfloat16" else {"gradient": 2e-6, "position": 5e-6}
    for what, tolerance in tolerances.items():
        before, after = (script.whole(runs, size, case, what) for size in (1, 2))
        for name in before:
            np.testing.assert_allclose(after[name], before[name], rtol=0, atol=tolerance, err_msg=f"{what} {name}")
    losses = [runs[size, 0][f"{case}|losses"] for size in (1, 2)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=0.3 if case == "bfloat16" else 5e-5)
    np.testing.assert_array_equal(runs[2, 0][f"{case}|losses"], runs[2, 1][f"{case}|losses"])


@pytest.mark.slow
def test_a_failed_chain_says_the_same_on_all_ranks(runs):
    assert str(runs[2, 0]["failure|message"]) == str(runs[2, 1]["failure|message"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("case", ["gpt2 everything sgld 16", "llama head sgnht 1"])
def test_gradients_are_those_of_the_cpu(case):
    cpu, cuda = (script.run_case(*script.CASES[case], Ranks(), device) for device in ("cpu", "cuda"))
    for name in cpu:
        if name.startswith("gradient/"):
            np.testing.assert_allclose(cuda[name], cpu[name], rtol=0, atol=2e-6, err_msg=name)
    assert cuda["losses"].shape == cpu["losses"].shape
    assert np.isfinite(cuda["losses"]).all()
