"""The comparisons of parity_devinterp.py: what must be equal, and what must be equal within Monte-Carlo error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patterning_dist.models.components import Component, select_component
from patterning_dist.models.huggingface import load_language_model
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling import sgld
from patterning_dist.sampling.posterior import Posterior

Arrays = Mapping[str, NDArray]


def compare(folder: Path, settings: dict) -> bool:
    """Print all comparisons; whether all of them hold."""
    with np.load(folder / "peer.npz") as stored, np.load(folder / "ours.npz") as stored_ours:
        peer, ours = dict(stored), dict(stored_ours)
    told = json.loads((folder / "peer.json").read_text())
    print(f"devinterp {told['devinterp']} on torch {told['torch']}, ours on torch {torch.__version__}")
    for lost in told["warnings"]:
        print(f"  the peer lost a chain: {lost}")
    failed = ["chains of the peer"] if told["warnings"] else []
    failed += _exact(select_component(load_language_model(str(folder / "model")), settings["head"]), settings, peer)
    failed += _statistical(ours, peer, settings["num_repetitions"])
    print(f"  FAILED: {', '.join(failed)}" if failed else "  all checks hold")
    return not failed


def _exact(component: Component, settings: dict, peer: Arrays) -> list[str]:
    """Coordinates, update rule and formula; names of those that differ."""
    same = _same_coordinates(component, peer)
    step = _step_difference(component, settings, peer)
    chi, scale = _chi_from_draws(peer), np.sqrt(np.mean(peer["chi"][0] ** 2))
    formula = np.abs(chi - peer["chi"][0]).max() / scale
    print("\nEqual to rounding")
    print(f"  {component.num_coordinates} free coordinates of {component.name}, the peer's the same: {same}")
    print(f"  sampler step from the peer's gradient and noise: off by {step:.1e} of its length (limit 1e-5)")
    print(f"  our chi from the peer's stored draws: largest difference {formula:.1e} of the rms chi (limit 1e-4)")
    checks = {"coordinates": same, "step": step < 1e-5, "formula": formula < 1e-4}
    return [name for name, good in checks.items() if not good]


def _statistical(ours: Arrays, peer: Arrays, num_repetitions: int) -> list[str]:
    """chi of all repetitions, entry by entry; names of the checks that fail."""
    a, b = (half["chi"].reshape(num_repetitions, -1) for half in (ours, peer))
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    z, half = _z_scores(a, b), num_repetitions // 2
    share, quantile = _share(z), _relabelled(a, b)
    # Of one repetition: what ours reports against the scatter of repetitions.
    reported = _rms(ours["standard_error"]) / _rms(a.std(axis=0, ddof=1))
    print(f"\nEqual within Monte-Carlo error: {num_repetitions} repetitions each, {a.shape[1]} entries of chi")
    print(f"  rms of chi: ours {_rms(mean_a):.5f}, peer {_rms(mean_b):.5f}")
    errors = [_rms(x.std(axis=0, ddof=1)) / np.sqrt(num_repetitions) for x in (a, b)]
    print(f"  rms of its standard error, from the repetitions: ours {errors[0]:.5f}, peer {errors[1]:.5f}")
    correlation, slope = np.corrcoef(mean_a, mean_b)[0, 1], mean_a @ mean_b / (mean_b @ mean_b)
    print(f"  correlation {correlation:.4f}, slope of ours on the peer's {slope:.4f}")
    print(f"  share of |z| < 1.96: {share:.3f} (limits 0.90 and 0.99), mean z {z.mean():+.3f}, ", end="")
    print(f"largest |z| {np.abs(z).max():.1f}")
    print("  the same share between halves of one's own repetitions: ", end="")
    print(f"ours {_share(_z_scores(a[:half], a[half:])):.3f}, peer {_share(_z_scores(b[:half], b[half:])):.3f}")
    print(
        f"  mean z^2 {np.mean(z**2):.3f}; as large in {quantile:.1%} of the ways to mix the repetitions (limit 0.1 %)"
    )
    print(f"  standard error that ours reports of one repetition, over the scatter of repetitions: {reported:.2f}")
    checks = {"share of |z|": 0.90 <= share <= 0.99, "mean z^2": quantile > 0.001}
    return [name for name, good in checks.items() if not good]


def _same_coordinates(component: Component, peer: Arrays) -> bool:
    """Whether the component holds just the elements of the peer's masks."""
    masks = _named(peer, "mask/")
    ours = {name: np.zeros_like(mask) for name, mask in masks.items()}
    if set(component.parameters) != set(ours):
        return False
    for piece in component.pieces:
        ours[piece.parameter][tuple(slice(start, stop) for start, stop in piece.box)] = True
    return all((ours[name] == masks[name]).all() for name in masks)


def _step_difference(component: Component, settings: dict, peer: Arrays) -> float:
    """Our update from the peer's positions, gradients and noise: largest difference over the length of a step."""
    posterior = Posterior(settings["inverse_temperature"], settings["localization"])

    def free(what: str) -> dict[str, torch.Tensor]:
        return component.free({name: torch.from_numpy(array) for name, array in _named(peer, what).items()})

    difference, length = 0.0, 0.0
    for step in range(len({key.split("/")[0] for key in peer if "/before/" in key})):
        before, after = free(f"{step}/before/"), free(f"{step}/after/")
        found = sgld.step_(
            sgld.State({name: w.clone() for name, w in before.items()}, step),
            free(f"{step}/gradient/"),
            free(f"{step}/noise/"),
            center=free("0/before/"),
            posterior=posterior,
            step_size=settings["step_size"],
        ).position
        difference = max(difference, *((found[name] - after[name]).abs().max().item() for name in after))
        length = max(length, *((before[name] - after[name]).abs().max().item() for name in after))
    return difference / length


def _chi_from_draws(peer: Arrays) -> NDArray[np.float64]:
    """Our estimator on the peer's per-token losses of its first repetition. [sequence, position]"""
    chains: dict[str, list[CoMoments]] = {"head": [], "full": []}
    for name, moments in chains.items():
        for number, losses in enumerate(peer[f"losses_{name}"].astype(np.float64)):
            columns = losses.reshape(len(losses), -1)
            # The peer takes phi as the deviation from the L(w*) in the store of the whole model.
            phi = columns.mean(axis=1, keepdims=True) - peer["init_loss_full"].mean()
            moments.append(CoMoments.empty(number, len(columns), 1, columns.shape[1]))
            moments[-1].update(phi, columns)
    return susceptibility(chains["head"], baseline="full", full=chains["full"]).chi[0].reshape(peer["chi"].shape[1:])


def _z_scores(a: NDArray, b: NDArray) -> NDArray:
    """(mean a - mean b) / sqrt(se_a^2 + se_b^2) of every entry, errors from the scatter of repetitions.

    a, b: [repetition, entry]. With R repetitions each z has Student's t with about 2 (R - 1) degrees of freedom: 93.7 %
    of them within 1.96 at R = 12.
    """
    return (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(sum(x.var(axis=0, ddof=1) / len(x) for x in (a, b)))


def _share(z: NDArray) -> float:
    return float((np.abs(z) < 1.96).mean())


def _rms(values: NDArray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _relabelled(a: NDArray, b: NDArray, num_shuffles: int = 2000) -> float:
    """Share of random exchanges of repetitions between a and b whose mean z^2 is at least the one seen.

    Entries of one repetition share its noise, so that a mean over entries scatters more than one of independent
    entries; exchanging whole repetitions keeps that in (a permutation test).
    """
    both, random = np.concatenate([a, b]), np.random.default_rng(0)
    seen, larger = np.mean(_z_scores(a, b) ** 2), 0
    for _ in range(num_shuffles):
        order = random.permutation(len(both))
        larger += np.mean(_z_scores(both[order[: len(a)]], both[order[len(a) :]]) ** 2) >= seen
    return float((1 + larger) / (1 + num_shuffles))


def _named(peer: Arrays, prefix: str) -> dict[str, NDArray]:
    return {key.removeprefix(prefix): value for key, value in peer.items() if key.startswith(prefix)}
