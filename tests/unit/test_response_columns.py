"""Weights do not depend on where chi lies, whole, in shards or in files; what is held does not grow with its length."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.response import columns, solver
from patterning_dist.response.columns import Columns, StoredShard
from patterning_dist.response.heaviest import Heaviest
from patterning_dist.response.solver import (
    largest_feasible_strength,
    solve_for_effective_sample_share,
    solve_weights,
)

BOUNDS = {"inverse_temperature": 30.0, "weight_min": 0.1, "weight_max": 3.5}
TARGET = np.array([1.0, -0.5, 2.0])
NUMBERS = ("strength", "largest_feasible_strength", "effective_sample_size", "top_percent_share")


def chi_of(num_samples, seed=0):
    rng = np.random.default_rng(seed)
    chi = rng.standard_t(4, size=(3, num_samples)) * np.array([[1.0], [1e-3], [1e2]])
    return (chi + chi.std(axis=1, keepdims=True)).astype(np.float32)


def stored(chi, folder, ends):
    """Files of the columns between consecutive ends."""
    files = []
    for start, end in zip((0, *ends), (*ends, chi.shape[1]), strict=True):
        files.append(folder / f"{start}.npy")
        np.save(files[-1], chi[:, start:end])
    return files


@pytest.mark.parametrize("grouped", [False, True])
def test_shards_in_files_are_solved_as_the_whole(tmp_path, monkeypatch, grouped):
    """Sums differ by their rounding, about 1e-16 times the root of the number of pieces: 1e-11 is far above it."""
    monkeypatch.setattr(columns, "PIECE", 3 * 700)  # several pieces a shard, and shards shorter than a piece
    monkeypatch.setattr(columns, "SAMPLE", 1000)
    chi = chi_of(12_000)
    groups = np.arange(12_000) % 7 if grouped else None
    whole = solve_for_effective_sample_share(chi, TARGET, 0.7, groups=groups, **BOUNDS)
    files = stored(chi, tmp_path, (1, 500, 7777))
    parts = solve_for_effective_sample_share(files, TARGET, 0.7, groups=groups, **BOUNDS)
    assert [getattr(parts, name) for name in NUMBERS] == pytest.approx(
        [getattr(whole, name) for name in NUMBERS], 1e-11
    )
    np.testing.assert_allclose(parts.predicted_response, whole.predicted_response, rtol=1e-11)
    np.testing.assert_allclose(np.concatenate(list(parts.parts())), whole.weights, atol=1e-11)
    assert "weights" not in vars(parts)  # which are whole where somebody asks
    assert max(len(part) for part in parts.parts()) <= 700


@pytest.mark.parametrize("method", [{}, {"method": "ridge", "ridge": 5.0}, {"method": "truncated", "rank": 2}])
def test_a_start_from_a_sample_changes_the_passes_and_not_the_weights(monkeypatch, method):
    chi = chi_of(20_000, seed=1)
    chi /= chi.std(axis=1, keepdims=True)
    alone = solve_for_effective_sample_share(chi, TARGET, 0.6, **method, **BOUNDS)
    monkeypatch.setattr(columns, "SAMPLE", 2000)
    begun = solve_for_effective_sample_share(chi, TARGET, 0.6, **method, **BOUNDS)
    assert begun.num_passes < alone.num_passes
    assert begun.strength == pytest.approx(alone.strength, rel=1e-11)
    np.testing.assert_allclose(begun.weights, alone.weights, atol=1e-10)
    again = solve_weights(chi, TARGET, strength=begun.strength, **method, **BOUNDS)
    np.testing.assert_allclose(again.weights, alone.weights, atol=1e-10)


def test_a_solve_of_many_columns_takes_a_handful_of_passes():
    """One for the moments, one for what is said of the weights, four of Newton's method, those of the largest
    strength, at most eleven at this tail and number of rows; one minimisation after the other took a hundred."""
    solution = solve_for_effective_sample_share(chi_of(400_000), TARGET, 0.8, **BOUNDS)
    assert solution.num_passes <= 18
    assert solution.num_iterations <= 4
    assert solution.residual < 1e-11
    assert solution.effective_sample_share == pytest.approx(0.8, rel=1e-11)


def test_where_newton_does_not_converge_the_strength_is_bracketed(monkeypatch):
    chi = chi_of(3000, seed=2)
    reached = solve_for_effective_sample_share(chi, TARGET, 0.6, **BOUNDS)
    monkeypatch.setattr(solver, "newton", lambda *args: None)
    bracketed = solve_for_effective_sample_share(chi, TARGET, 0.6, **BOUNDS)
    assert bracketed.num_passes > reached.num_passes
    assert bracketed.strength == pytest.approx(reached.strength, rel=2e-10)  # 1e-10 is where brackets end
    np.testing.assert_allclose(bracketed.weights, reached.weights, atol=1e-8)


def test_targets_out_of_reach_say_so_from_files_too(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "SAMPLE", 500)
    chi = chi_of(4000, seed=3)
    files = stored(chi, tmp_path, (2500,))
    largest = largest_feasible_strength(files, TARGET, **BOUNDS)
    assert largest == pytest.approx(largest_feasible_strength(chi, TARGET, **BOUNDS), rel=1e-9)
    with pytest.raises(PatterningError, match=f"out of reach with .*strength is {largest:.6g}; lower"):
        solve_weights(files, TARGET, strength=1.001 * largest, **BOUNDS)
    smallest = solve_weights(chi, TARGET, strength=largest, **BOUNDS).effective_sample_share
    with pytest.raises(PatterningError, match=f"0.02 is below {smallest:.4g}, the smallest"):
        solve_for_effective_sample_share(files, TARGET, 0.02, **BOUNDS)
    np.save(files[1], np.where(np.arange(1500) == 1499, np.nan, chi[:, 2500:]))
    with pytest.raises(PatterningError, match="has an entry that is not finite"):
        solve_weights(files, TARGET, **BOUNDS)
    np.save(files[1], chi[:2, 2500:])
    with pytest.raises(PatterningError, match="column shards of it with the same observables"):
        solve_weights(files, TARGET, **BOUNDS)


def test_what_is_held_does_not_grow_with_the_columns(tmp_path, monkeypatch):
    """Sixteen times the columns: the heaviest 1 % are kept, at most three times, and nothing else as long as these."""
    monkeypatch.setattr(columns, "PIECE", 3 << 13)
    monkeypatch.setattr(columns, "SAMPLE", 1 << 12)
    peaks, numbers = [], (1 << 16, 1 << 20)
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        files = stored(chi_of(number), folder, (number // 3,))
        tracemalloc.start()
        solution = solve_for_effective_sample_share(files, TARGET, 0.8, **BOUNDS)
        total = sum(float(part.sum()) for part in solution.parts())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == pytest.approx(number, rel=1e-12)
    assert peaks[1] - peaks[0] < 3 * 8 * 0.01 * (numbers[1] - numbers[0]) + 0.1 * peaks[0]
    assert peaks[1] < numbers[1] * 3  # bytes: chi in float64 takes 24 a column


def test_no_page_of_a_file_stays_resident(tmp_path):
    """Resident memory of a process, 96 MB of chi in: mapped pages count there, which tracemalloc does not see."""
    np.save(tmp_path / "chi.npy", chi_of(8_000_000))
    text = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from patterning_dist.response.columns import Columns\n"
        # Not ru_maxrss, which begins with that of the process that starts this one.
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "list(map(np.sum, Columns(np.ones((3, 1 << 19)))))\n"
        "before = peak(); Columns([Path(sys.argv[1])]).survey(); print(peak() - before)"
    )
    found = subprocess.run([sys.executable, "-c", text, tmp_path / "chi.npy"], capture_output=True, check=True)
    assert int(found.stdout) < 50_000  # KiB: pieces, and a sample of 65,536 columns


def test_survey_equals_numpy_and_the_sample_is_of_the_pool(monkeypatch):
    monkeypatch.setattr(columns, "PIECE", 3 * 1000)
    monkeypatch.setattr(columns, "SAMPLE", 300)
    chi = chi_of(10_000).astype(np.float64)
    one, several = (Columns(given).survey() for given in (chi, [chi[:, :123], chi[:, 123:]]))
    for survey in (one, several):
        np.testing.assert_allclose(survey.mean, chi.mean(axis=1), rtol=1e-13)
        np.testing.assert_allclose(survey.covariance, np.cov(chi, bias=True), rtol=1e-12, atol=0)
    np.testing.assert_array_equal(one.sample, several.sample)
    places = [int(np.flatnonzero((chi == column[:, None]).all(axis=0))[0]) for column in one.sample.T]
    runs = np.array(places) // (10_000 // 300)
    np.testing.assert_array_equal(runs, np.arange(len(places)))  # one of every run


def test_the_heaviest_of_a_stream_sum_to_those_of_the_whole():
    rng = np.random.default_rng(4)
    values = np.minimum(rng.exponential(size=10_000), 2.0)  # thirteen in a hundred at the maximum
    for number in (1, 100, 1500, 9999, 10_000):
        heaviest = Heaviest(number)
        for part in np.array_split(values, 37):
            heaviest.add(part)
        assert heaviest.total() == pytest.approx(np.sort(values)[-number:].sum(), rel=1e-12)


def test_a_stored_shard_reads_what_is_asked_for(tmp_path):
    chi = chi_of(50)
    np.save(tmp_path / "chi.npy", chi)
    shard = StoredShard(tmp_path / "chi.npy")
    assert shard.shape == (3, 50)
    np.testing.assert_array_equal(shard[:, 7:19], chi[:, 7:19])
