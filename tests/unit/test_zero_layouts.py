"""A training in DeepSpeed is that of plain torch on weighted losses, whatever the ZeRO stage, the ranks and the number
of backward passes; in bfloat16 within its rounding, from float32 masters. Another number of ranks can go on with it."""

from __future__ import annotations

import json

import pytest
import torch
import zero_script as script
from safetensors.torch import load_file

from patterning_dist.models.huggingface import load_language_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An experiment that one rank and two have trained by every case."""
    folder = tmp_path_factory.mktemp("zero")
    script.write_experiment(folder)
    script.run_groups(folder, (1, 2))
    return folder


@pytest.fixture(scope="module")
def by_hand(folder):
    return script.by_hand(folder)


def without_key_bias(weights):
    """Nothing depends on the keys' bias, whose gradient is rounding, and Adam makes steps of the usual length of it."""
    return {
        name: w.view(2, 3, -1)[:, [0, 2]] if name.endswith("query_key_value.bias") else w for name, w in weights.items()
    }


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", script.CASES)
def test_it_is_plain_torch(folder, by_hand, case, size):
    result = folder / f"{case}-{size}"
    losses, weights = by_hand
    start = dict(load_language_model(str(folder / "model")).named_parameters())
    found = load_file(result / "model.safetensors")
    initial, report = load_file(result / "initial.safetensors"), json.loads((result / "found.json").read_text())
    assert initial.keys() == start.keys() and all(torch.equal(initial[name], w) for name, w in start.items())
    moved = max((weights[name] - w).abs().max().item() for name, w in start.items())
    narrow = case.startswith("bf16")
    # A relative rounding of 2^-9 of logits of about .2, and of Adam's steps .003 where a gradient is near 0.
    assert report["checkpointed"] == ["checkpointed" in case] * 2
    assert report["losses"] == pytest.approx(losses, abs=5e-4 if narrow else 2e-6)
    found, weights = without_key_bias(found), without_key_bias(weights)
    distances = torch.cat([(found[name] - w).abs().flatten() for name, w in weights.items()])
    assert distances.max() < (moved if narrow else 2e-5)
    assert distances.mean() < (0.02 if narrow else 1e-4) * moved
    assert report["observables"]["all"] == pytest.approx(report["metrics"]["validation_loss"], abs=1e-6)
    if narrow:  # what is kept is finer than what is computed with
        assert any((w.bfloat16().float() != w).any() for w in found.values())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", script.RESUMED)
def test_a_checkpoint_is_taken_up_by_as_many_ranks_and_by_others(folder, case, size):
    undisturbed, own, other = (
        load_file(folder / name / "model.safetensors")
        for name in (f"{case}-{size}", f"{case}-{size}-from-{size}", f"{case}-{size}-from-{3 - size}")
    )
    assert all(torch.equal(own[name], w) for name, w in undisturbed.items())
    start = load_file(folder / f"{case}-{size}" / "initial.safetensors")
    moved = max((w - start[name]).abs().max().item() for name, w in undisturbed.items())
    other, undisturbed = without_key_bias(other), without_key_bias(undisturbed)
    distances = torch.cat([(other[name] - w).abs().flatten() for name, w in undisturbed.items()])
    # Three of the steps were taken by others, and the rest from where those had come.
    assert distances.max() < (moved if case.startswith("bf16") else 2e-5)
    assert distances.mean() < (0.02 if case.startswith("bf16") else 1e-4) * moved
    for of in (1, 2):  # the weights at the checkpoint, from an average of one
        average = load_file(folder / f"{case}-{size}-from-{of}" / "average.safetensors")
        middle = load_file(folder / f"{case}-{of}" / "middle.safetensors")
        assert all(torch.equal(average[name], w) for name, w in middle.items())
