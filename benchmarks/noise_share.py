"""What share of an SGLD step goes into its noise?

Times whole steps (minibatch gradient, noise, update), the same steps with noise that was made once and is used again,
and the noise alone. The three take turns, and medians are taken, so that other work on the machine hits all alike; the
share is that of the noise alone in the whole step. Two models: one head of the small attention-only transformer of the
quickstart, and all weights of a GPT-2 of some ten million parameters, with random weights.

    python benchmarks/noise_share.py                    # CPU, as many threads as torch takes
    python benchmarks/noise_share.py --device cuda
    OMP_NUM_THREADS=1 python benchmarks/noise_share.py  # one thread
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import Component, Vector, select_component
from patterning_dist.models.losses import token_losses
from patterning_dist.sampling import sgld
from patterning_dist.sampling.noise import Noise, standard_normal
from patterning_dist.sampling.posterior import Posterior

POSTERIOR, STEP_SIZE = Posterior(inverse_temperature=30.0, localization=100.0), 1e-7
LIMIT = 0.15  # of a step


class Case(NamedTuple):
    """A model, what of it is free, and its minibatch."""

    name: str
    model: nn.Module
    component: Component
    tokens: Tensor  # sequence position
    logits: Callable[[Tensor], Tensor]


def cases(device: str) -> list[Case]:
    """The two models; the second with a small and with a usual minibatch."""
    small = AttentionOnlyTransformer(AttentionOnlyConfig(), 2048, 128).to(device)
    head = select_component(small, "layer.1.head.2")
    tokens = torch.randint(2048, (8, 128), device=device)
    found = [Case("one head, 8 x 128 tokens", small, head, tokens, small)]

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=8192, n_positions=256, n_embd=320, n_layer=6, n_head=5, bos_token_id=0, eos_token_id=0
    )
    large = GPT2LMHeadModel(config).to(device).eval()
    everything = select_component(large, "everything")
    for num_sequences in (4, 16):
        tokens = torch.randint(8192, (num_sequences, 128), device=device)
        name = f"GPT-2 of {everything.num_coordinates / 1e6:.1f} M, {num_sequences} x 128 tokens"
        found.append(Case(name, large, everything, tokens, lambda inputs: large(inputs).logits))
    return found


def measure(case: Case, device: str, num_steps: int) -> dict[str, float]:
    """Median seconds of a step with fresh and with kept noise, and of the noise alone."""
    parameters = dict(case.model.named_parameters())
    case.model.requires_grad_(False)
    moving = [parameters[name].requires_grad_(True) for name in case.component.parameters]
    names = case.component.parameters
    live = {name: w.detach() for name, w in case.component.free(parameters).items()}
    center = {name: w.clone() for name, w in live.items()}
    shapes = {name: tuple(w.shape) for name, w in live.items()}
    extents = {name: (0, w.numel()) for name, w in live.items()}

    def noise(step: int) -> Noise:
        return Noise(0, 0, step, extents, shapes, device)

    def gradient() -> Vector:
        loss = token_losses(case.logits(case.tokens[:, :-1]), case.tokens).mean()
        return case.component.free(dict(zip(names, torch.autograd.grad(loss, moving), strict=True)))

    def walk(state: sgld.State, noise: Mapping[str, Tensor]) -> None:
        sgld.step_(state, gradient(), noise, center=center, posterior=POSTERIOR, step_size=STEP_SIZE)

    kept = dict(noise(0))
    kinds: dict[str, Callable[[int], object]] = {
        "fresh": lambda step: walk(sgld.State(live, step), noise(step)),
        "kept": lambda step: walk(sgld.State(live, step), kept),
        "alone": lambda step: [noise(step)[name] for name in extents],
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step in range(num_steps + 3):
        for kind, run in kinds.items():
            started = now(device)
            run(step)
            if step >= 3:  # the first ones warm up
                seconds[kind].append(now(device) - started)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def now(device: str) -> float:
    """The time at which all work given to the device is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def per_normal(device: str, num: int = 2**20) -> tuple[float, float]:
    """Median nanoseconds a number of this noise and of torch.randn, one piece of ``num``."""
    routes = (
        lambda step: standard_normal(0, 0, step, "w", 0, num, device),
        lambda step: torch.randn(num, device=device),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(33):
        for route, values in zip(routes, seconds, strict=True):
            started = now(device)
            route(step)
            values.append(now(device) - started)
    ours, torchs = (statistics.median(values[3:]) / num * 1e9 for values in seconds)
    return ours, torchs


def main() -> None:
    """Measure, print the table, and say whether noise stays below its limit."""
    parser = argparse.ArgumentParser(description="Share of an SGLD step that goes into its noise.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each kind")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = arguments.device
    name = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else torch.cuda.get_device_name()
    ours, torchs = per_normal(device)
    print(f"{name}; a number of a piece of 1 M: {ours:.2f} ns, of torch.randn {torchs:.2f} ns\n")
    print(f"{'case':<32}{'step, ms':>10}{'kept noise, ms':>16}{'noise alone, ms':>17}{'share':>8}")
    shares = []
    for case in cases(device):
        seconds = measure(case, device, arguments.steps)
        shares.append(seconds["alone"] / seconds["fresh"])
        times = [1000 * seconds[kind] for kind in ("fresh", "kept", "alone")]
        print(f"{case.name:<32}{times[0]:>10.2f}{times[1]:>16.2f}{times[2]:>17.2f}{shares[-1]:>8.1%}", flush=True)
    raise SystemExit(None if max(shares) <= LIMIT else f"noise takes more than {LIMIT:.0%} of a step")


if __name__ == "__main__":
    main()
