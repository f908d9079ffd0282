"""What a pass and a gradient of one attention head take where more and more of what does not move is computed once.

For the quickstart's transformer and a GPT-NeoX of .66 M weights, both fresh, a head of the last layer. ``whole``: every
pass is a whole one; ``below``: from the layer on; ``around``: the head alone; ``table``: the product of the rest of the
residual stream with the vocabulary is there, too. Forward passes are of 64 sequences of 127 predicted tokens. Gradients
are of 16 of them that come again, and of 8 that do not. At half of d_model, in the quickstart, a head gets no table.

    OMP_NUM_THREADS=1 python benchmarks/around_head.py     # four minutes on a quiet core
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import select_component
from patterning_dist.models.cutting import cut_around
from patterning_dist.models.huggingface import fresh_language_model
from patterning_dist.models.losses import token_losses
from patterning_dist.models.passes import next_token_losses
from patterning_dist.sampling.first_moment import antithetic_pair, mean_rises
from patterning_dist.sampling.layered import Layered, Prepared
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.attention_only import LayersAbove

VOCABULARY, LENGTH, GAMMA, NUM_PAIRS, POOL = 1024, 128, 25.0, 8, 512
HEAD, LAYER, WHOLE = "layer.1.head.2", "layer.1", "whole"
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(POOL, LENGTH)))


class WithoutTable:
    """A ``Layered`` model whose states are as small as they can be."""

    def __init__(self, layered: Layered) -> None:
        self.layered, self.pays_once = layered, layered.pays_once

    def below(self, batch: Any, room: int) -> Any:
        return self.layered.below(batch, 0)

    def above(self, state: Any, batch: Any) -> Tensor:
        return self.layered.above(state, batch)


def quickstart() -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Layered | None]]:
    config = AttentionOnlyConfig(num_layers=2, num_heads=4, d_model=64, d_head=32, position_bias_init=6)
    model = AttentionOnlyTransformer(config, VOCABULARY, LENGTH)
    return model, lambda model, tokens: token_losses(model(tokens[:, :-1]), tokens), LayersAbove


def neox() -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Layered | None]]:
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return fresh_language_model(config, 0), next_token_losses, cut_around


def cpu_milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least that each took in rounds of all of them in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], 1000 * (time.process_time() - start))
    return best


def targets(make: Callable[[], Any]) -> dict[str, Target]:
    found = {}
    for kind in ("whole", "below", "around", "table"):
        model, losses, cut = make()
        component = select_component(model, HEAD)
        layered = cut(model, select_component(model, LAYER) if kind == "below" else component)
        layered = None if kind == "whole" else WithoutTable(layered) if kind == "around" else layered
        found[kind] = Target(model, component, losses, TOKENS, TOKENS[:64], layered=layered)
    return found


def timed(name: str, by_kind: dict[str, Target], rounds: int) -> None:
    """Print the table of a model."""
    ids = np.arange(8)
    kept = {kind: Prepared(list(target.probe.parts)[:1], 16) for kind, target in by_kind.items()}

    def moments(target: Target) -> Tensor:
        groups = [antithetic_pair(target, number, seed=0, gamma=GAMMA) for number in range(NUM_PAIRS)]
        return mean_rises(target, target.prepare(TOKENS), groups)

    rows: dict[str, Callable[[str, Target], object]] = {
        "forward, 64": lambda kind, target: target.losses(target.probe),
        "gradient, 16 that come again": lambda kind, target: target.mean_gradient(kept[kind]),
        "gradient, 8 that do not": lambda kind, target: target.gradient(ids),
        f"first moments, {POOL}": lambda kind, target: moments(target),
    }
    print(f"\n{name}, CPU ms (and how many times faster)\n| | {' | '.join(by_kind)} |")
    for row, call in rows.items():
        calls = {kind: partial(call, kind, target) for kind, target in by_kind.items()}
        times = cpu_milliseconds(calls, 2 if "moments" in row else rounds)
        print(f"| {row} | {' | '.join(f'{ms:.1f} ({times[WHOLE] / ms:.1f})' for ms in times.values())} |")
    found = {kind: moments(target) for kind, target in by_kind.items()}
    size = found[WHOLE].square().mean().sqrt()
    off = {kind: ((value - found[WHOLE]).square().mean().sqrt() / size).item() for kind, value in found.items()}
    print("first moments off by, of their size:", {kind: f"{value:.1e}" for kind, value in off.items()})


def main() -> None:
    """Time both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of which the fastest counts")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, make in (("quickstart", quickstart), ("GPT-NeoX", neox)):
        timed(name, targets(make), rounds)


if __name__ == "__main__":
    main()
