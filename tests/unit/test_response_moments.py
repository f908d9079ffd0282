"""Streamed co-moments must equal two-pass ones, whatever the blocks, the offset and the order."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import CoMoments, Moments, healthy_chains, merge_moments


def draws(num_draws, num_observables=2, num_probes=5, seed=0):
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(num_draws, num_observables))
    losses = rng.normal(size=(num_draws, num_probes)) + phi[:, :1]
    return phi, losses


def two_pass(phi, losses):
    phi, losses = phi.astype(np.longdouble), losses.astype(np.longdouble)
    mean_phi, mean_loss = phi.mean(0), losses.mean(0)
    phi, losses = phi - mean_phi, losses - mean_loss
    moments = (len(phi), mean_phi, mean_loss, (phi**2).sum(0), (losses**2).sum(0), phi.T @ losses)
    return Moments(moments[0], *(np.asarray(m, np.float64) for m in moments[1:]))


def assert_same(a, b, rtol=1e-10):
    assert a.count == b.count
    for x, y in zip(dataclasses.astuple(a)[1:], dataclasses.astuple(b)[1:], strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


def stream(phi, losses, sizes, num_batches=4, num_draws=None):
    moments = CoMoments.empty(3, num_draws or len(phi), phi.shape[1], losses.shape[1], num_batches)
    start = 0
    for size in sizes:
        moments.update(phi[start : start + size], losses[start : start + size])
        start += size
    return moments


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    half_batches=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_streamed_equals_two_pass_for_any_blocks(sizes, half_batches, seed):
    total = sum(sizes)
    if total < 2 * half_batches:
        sizes, total = [6], 6
    phi, losses = draws(total, seed=seed)
    moments = stream(phi, losses, sizes, 2 * half_batches)
    assert_same(moments.total(), two_pass(phi, losses))
    batch = np.arange(total) * 2 * half_batches // total
    for index in range(2 * half_batches):
        assert_same(moments.batch(index), two_pass(phi[batch == index], losses[batch == index]))
    first = 2 * np.arange(total) < total
    for half, rows in zip(moments.halves(), (first, ~first), strict=True):
        assert_same(half, two_pass(phi[rows], losses[rows]))


def test_even_chain_splits_in_the_middle():
    phi, losses = draws(20)
    first, second = stream(phi, losses, [20]).halves()
    assert_same(first, two_pass(phi[:10], losses[:10]))
    assert_same(second, two_pass(phi[10:], losses[10:]))


def test_huge_offset_is_handled():
    phi, losses = draws(400)
    offset = 2.0**20  # exact in float64 together with the draws' leading bits
    phi, losses = np.round(phi * 2**20) / 2**20, np.round(losses * 2**20) / 2**20
    moments = stream(phi + offset, losses + offset, [1] * 100 + [50] * 6).total()
    plain = two_pass(phi, losses)
    np.testing.assert_allclose(moments.comoment, plain.comoment, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(moments.mean_loss - offset, plain.mean_loss, atol=1e-9)


def test_deviations_keep_float32_precise_where_raw_sums_do_not():
    # A loss near 3 with a posterior standard deviation of 1e-3, in float32.
    rng = np.random.default_rng(1)
    deviation = rng.normal(size=(2000, 1)) * 1e-3
    exact = two_pass(deviation, deviation).comoment[0, 0]
    fed = deviation.astype(np.float32)
    assert stream(fed, fed, [500] * 4).total().comoment[0, 0] == pytest.approx(exact, rel=1e-6)
    raw = (deviation + 3.0).astype(np.float32)
    wrong = np.sum(raw * raw, dtype=np.float32) - np.sum(raw, dtype=np.float32) ** 2 / np.float32(2000)
    assert abs(wrong / exact - 1) > 0.5


def test_merging_is_associative_and_commutative():
    phi, losses = draws(60)
    a, b, c = (two_pass(phi[rows], losses[rows]) for rows in (slice(0, 7), slice(7, 8), slice(8, 60)))
    whole = two_pass(phi, losses)
    assert_same(merge_moments(merge_moments(a, b), c), whole)
    assert_same(merge_moments(a, merge_moments(b, c)), whole)
    assert_same(merge_moments(merge_moments(c, a), b), whole)
    empty = CoMoments.empty(0, 4, 2, 5, 2).batch(0)
    assert merge_moments(empty, a) is a
    assert merge_moments(a, empty) is a


def test_state_survives_npz_and_goes_on():
    phi, losses = draws(40)
    whole = stream(phi, losses, [40])
    part = stream(phi, losses, [13], num_draws=40)
    file = io.BytesIO()
    np.savez(file, **part.state_dict())
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        restored = CoMoments.from_state_dict(saved)
    assert restored.chain == 3
    restored.update(phi[13:], losses[13:])
    assert_same(restored.total(), whole.total())
    assert part.num_recorded == 13  # the copy is a copy
    state = part.state_dict()
    del state["m2_phi"]
    with pytest.raises(PatterningError, match="key 'm2_phi' is missing"):
        CoMoments.from_state_dict(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_names_chain_and_draw_and_changes_nothing(bad):
    phi, losses = draws(40)
    moments = stream(phi, losses, [10], num_draws=40)
    before = moments.state_dict()
    losses[17, 2] = bad
    with pytest.raises(PatterningError, match=f"chain 3, draw 17: probe loss 2 is {bad}"):
        moments.update(phi[10:], losses[10:])
    phi[12, 1] = bad
    with pytest.raises(PatterningError, match=f"chain 3, draw 12: observable 1 is {bad}"):
        moments.update(phi[10:], losses[10:])
    for name, value in moments.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_wrong_input_is_named():
    phi, losses = draws(10)
    moments = stream(phi, losses, [10])
    with pytest.raises(PatterningError, match="chain 3: draw 10 is past the 10 planned draws"):
        moments.update(phi[:1], losses[:1])
    with pytest.raises(PatterningError, match=r"got phi \(10, 2\) and losses \(10, 4\)"):
        moments.update(phi, losses[:, 1:])
    for num_batches, num_draws in ((3, 10), (0, 10), (16, 10)):
        with pytest.raises(PatterningError, match=f"{num_batches} batches for {num_draws} draws"):
            CoMoments.empty(0, num_draws, 1, 1, num_batches)


def test_health_is_all_draws_and_finite_moments():
    good, short, bad = (CoMoments.empty(chain, planned, 1, 2, 4) for chain, planned in ((0, 8), (1, 10), (2, 8)))
    for moments in (good, short, bad):
        moments.update(np.ones((8, 1)), np.ones((8, 2)))
    bad.comoment[0, 0, 0] = np.inf
    healthy, excluded = healthy_chains([good, short, bad])
    assert healthy == [good]
    assert excluded == {1: "8 of 10 draws recorded", 2: "moments are not finite"}
