"""Noise is addressed: every element follows from (seed, chain, step, piece, flat element) alone, and is N(0, 1)."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
import torch
from philox_reference import KNOWN_ANSWERS, normal, philox4x64, word
from scipy import stats

from patterning_dist.sampling import noise as noise_module
from patterning_dist.sampling.noise import Noise, standard_normal

ADDRESS = (3, 1, 8, "h.0.attn.c_attn.weight[:,0:16]")


def generator_route(seed, chain, step, piece, start, stop):
    """What other devices do, on the CPU."""
    return noise_module._generator_normal(f"{seed}/{chain}/{step}/{piece}", start, stop, "cpu")


ROUTES = {"philox": standard_normal, "generator": generator_route}


@pytest.fixture
def small_blocks(monkeypatch):
    """Bounds of torch's blocks scaled down, so that tests cross many of them."""
    monkeypatch.setattr(noise_module, "_GENERATOR_BLOCK", 1024)
    monkeypatch.setattr(noise_module, "_GENERATOR_STARTS", (0, 16, 128, 1024))


# The oracle


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS)
def test_the_reference_gives_the_known_answers(counter, key, block):
    assert philox4x64(counter, key) == block


@pytest.mark.parametrize("counter", [(4, 8, 0, 0), (2**64 - 2, 7, 3, 1)])
def test_numpy_raises_its_counter_before_the_first_block(counter):
    key = (0x0123456789ABCDEF, 42)
    raw = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)).random_raw(4)
    assert tuple(map(int, raw)) == philox4x64((counter[0] + 1, *counter[1:]), key)


def key_of(seed, chain, piece):
    digest = hashlib.blake2b(f"{seed}/{chain}/{piece}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def test_words_are_those_of_the_reference():
    tiles = np.empty((2, 2, 256), np.float32)
    got = noise_module._words(noise_module._key(3, 1, "w"), 8, 5, tiles).reshape(-1)
    assert got.tolist() == [word(key_of(3, 1, "w"), 8, 5 * 512 + i) for i in range(1024)]


@pytest.mark.parametrize(("step", "start"), [(0, 0), (8, 200), (2**40, 2**33 + 300)])
def test_normals_are_those_of_the_reference(step, start):
    got = standard_normal(3, 1, step, "w", start, start + 700)
    wanted = np.array([normal(key_of(3, 1, "w"), step, start + i) for i in range(700)])
    assert got.dtype == torch.float32
    error = np.abs(got.numpy() - wanted) / np.spacing(np.abs(wanted).astype(np.float32))
    assert error.max() < 4


def test_the_words_at_the_edges_give_finite_normals():
    smallest, largest = -(2**31), 2**31 - 1
    edges = np.array([0, 1, -1, smallest, largest, 2**30], np.int32)
    words = np.zeros((len(edges), 2, len(edges)), np.int32)
    words[:, 0], words[:, 1] = edges[:, None], edges[None]
    normals = np.full(words.shape, np.nan, np.float32)
    noise_module._box_muller(words, normals)
    assert np.isfinite(normals).all()
    radius = np.hypot(normals[:, 0], normals[:, 1])
    assert radius.max() == pytest.approx(np.sqrt(64 * np.log(2)), rel=1e-6)  # the largest there is: word 0
    assert (radius[3:5] == 0).all()
    # Not even the smallest number but zero comes near the denormals, which a device may flush.
    assert np.abs(normals[normals != 0]).min() > 1e-14


# Addresses


@pytest.mark.parametrize("route", ROUTES)
def test_any_slice_is_the_whole_at_that_place(route, small_blocks):
    rng, length = np.random.default_rng(0), 5000
    whole = ROUTES[route](*ADDRESS, 0, length)
    cuts = [rng.integers(0, length + 1, size=2) for _ in range(60)]
    cuts += [(0, 0), (length, length), (511, 513), (512, 1024), (15, 17), (128, 1024), (4999, 5000)]
    for start, stop in map(sorted, cuts):
        part = ROUTES[route](*ADDRESS, int(start), int(stop))
        assert part.shape == (stop - start,)
        assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_uneven_shards_join_to_the_whole(route, world):
    # As large as the blocks, slabs and threads of real use.
    length = 1_500_003
    bounds = [length * rank // world + (rank % 2) * 7 for rank in range(world)] + [length]
    parts = [ROUTES[route](*ADDRESS, a, b) for a, b in zip([0, *bounds[1:-1]], bounds[1:], strict=True)]
    assert torch.equal(torch.cat(parts), ROUTES[route](*ADDRESS, 0, length))


def test_bounds_of_torch_blocks_do_not_depend_on_the_piece():
    # The second block of torch's generator is used by both: a longer piece begins with a shorter one.
    short, long = (generator_route(*ADDRESS, 0, stop) for stop in (70_000, 600_000))
    assert torch.equal(long[:70_000], short)


def test_number_of_threads_does_not_matter(monkeypatch):
    length = 600_001
    alone = standard_normal(*ADDRESS, 5, length)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(noise_module, "_SLABS_PER_THREAD", 2)
    assert torch.equal(standard_normal(*ADDRESS, 5, length), alone)


def test_threads_do_not_disturb_each_other():
    wanted = [standard_normal(3, chain, 8, "w", 0, 50_000) for chain in range(4)]
    wrong = []

    def work(chain):
        for _ in range(20):
            if not torch.equal(standard_normal(3, chain, 8, "w", 0, 50_000), wanted[chain]):
                wrong.append(chain)

    threads = [threading.Thread(target=work, args=(chain,)) for chain in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "other",
    [(4, 1, 8, "w"), (3, 2, 8, "w"), (3, 1, 9, "w"), (3, 1, 8, "v"), (1, 3, 8, "w"), (31, 8, 8, "w"), (3, 18, 8, "w")],
)
@pytest.mark.parametrize("route", ROUTES)
def test_other_addresses_have_unrelated_numbers(route, other):
    length = 100_000
    a, b = ROUTES[route](3, 1, 8, "w", 0, length).double(), ROUTES[route](*other, 0, length).double()
    for shift in (0, 1, 8, 256, 512):
        correlation = (a[: length - shift] * b[shift:]).mean().item()
        assert abs(correlation) < 4.5 / (length - shift) ** 0.5


def test_the_global_generators_are_left_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    standard_normal(*ADDRESS, 0, 1000)
    generator_route(*ADDRESS, 0, 1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


# Distribution


@pytest.mark.parametrize("route", ROUTES)
def test_numbers_are_standard_normal(route):
    num = 4_000_000
    x = ROUTES[route](17, 2, 5, "w", 0, num).double().numpy()
    # Raw moments of N(0, 1) are 0 1 0 3 0 15; the variance of x^k is E x^2k - (E x^k)^2.
    raw = [1, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395]
    for k in range(1, 7):
        error = np.sqrt((raw[2 * k] - raw[k] ** 2) / num)
        assert abs((x**k).mean() - raw[k]) < 4.5 * error, k
    assert stats.kstest(x[:1_000_000], "norm").pvalue > 1e-4
    for lag in (1, 2, 3, 4, 7, 8, 16, 255, 256, 257, 512, 65536):
        assert abs((x[lag:] * x[:-lag]).mean()) < 4.5 / np.sqrt(num - lag), lag
        # Box-Muller makes x and y of one radius: their squares must be independent too.
        assert abs(((x[lag:] ** 2 - 1) * (x[:-lag] ** 2 - 1)).mean()) < 4.5 * 2 / np.sqrt(num - lag), lag
    for bound in (1.0, 3.0, 4.0, 4.8):
        for side in (x, -x):
            expected = num * stats.norm.sf(bound)
            assert abs((side > bound).sum() - expected) < 4.5 * np.sqrt(expected) + 1, bound


def test_every_place_of_a_tile_is_standard_normal_over_the_steps():
    draws = torch.stack([standard_normal(2, 0, step, "w", 0, 512) for step in range(20_000)]).double()
    assert draws.mean(dim=0).abs().max() < 5 / 20_000**0.5
    assert (draws.var(dim=0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


# The mapping


def test_noise_of_a_shard_is_shaped_like_it():
    extents = {"a": (6, 12), "b": (0, 4), "empty": (3, 3)}
    noise = Noise(5, 2, 9, extents, {"a": (2, 3), "b": torch.Size([4]), "empty": (0, 7)})
    assert list(noise) == list(extents)
    assert len(noise) == 3
    assert noise["a"].shape == (2, 3)
    assert noise["empty"].shape == (0, 7)
    assert torch.equal(noise["a"].flatten(), standard_normal(5, 2, 9, "a", 0, 20)[6:12])
    assert torch.equal(noise["b"], standard_normal(5, 2, 9, "b", 0, 4))
    assert noise["b"] is not noise["b"]  # made when asked for


def test_noise_refuses_a_shape_that_does_not_fit():
    with pytest.raises(RuntimeError, match=r"shape '\[5\]' is invalid for input of size 6"):
        Noise(5, 2, 9, {"a": (6, 12)}, {"a": (5,)})["a"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slices_on_a_gpu():
    whole = standard_normal(*ADDRESS, 0, 5_000_000, "cuda")
    assert whole.device.type == "cuda"
    for start, stop in [(0, 10), (65_530, 65_540), (4_194_300, 4_194_310), (7, 4_999_999)]:
        assert torch.equal(standard_normal(*ADDRESS, start, stop, "cuda"), whole[start:stop])
    assert abs(whole.mean().item()) < 4.5 / 5_000_000**0.5
    assert abs(whole.var().item() - 1) < 4.5 * (2 / 5_000_000) ** 0.5
