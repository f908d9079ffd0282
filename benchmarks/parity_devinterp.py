"""Do our susceptibilities agree with devinterp 2.0.1, entry by entry, and what do both take in time and disk?

Trains a small GPT-NeoX (built from its config class; nothing is downloaded), lets the peer sample one attention head
and the whole model R times with its own code in its own interpreter, lets ours do the same, and compares

    chi_i = E_C[phi L] - E_C[phi l_i] - E_C[phi] E_full[L - l_i],   phi = L(w) - L(w*)      (Baker et al. 2504.18274)

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 && PEER/bin/pip install devinterp==2.0.1
    python benchmarks/parity_devinterp.py --peer-python PEER/bin/python

Exits with 1 if one of the checks fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from parity_checks import compare
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

from patterning_dist.models.passes import next_token_losses

VOCABULARY, LENGTH, NUM_SEQUENCES = 32, 32, 32
TRAINING_STEPS = 600
SETTINGS = {
    "head": "layer.0.head.1",
    "peer_head": "l0h1",
    "inverse_temperature": 30.0,
    "localization": 1000.0,
    "step_size": 1e-3,
    "batch_size": 16,
    "num_chains": 2,
    "burn_in": 10,
    "steps_between_draws": 1,
    "num_threads": 1,
}
COSTS = """\
  Wall and CPU (user + system, all threads) are of the repetitions alone, writing included, without the start of the
  interpreter, imports and the reading of the model. Memory is VmRSS and VmHWM of the process. Disk is the sizes of
  the files left: the peer's zarr stores of losses; our co-moments, traces of phi and table of chi with errors."""


def make_tokens(num: int, seed: int) -> NDArray[np.int64]:
    """Sequences [sequence, position] from one Markov chain, whose second half repeats the first: work for heads."""
    cumulative = np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.1), size=VOCABULARY).cumsum(axis=1)
    random = np.random.default_rng(seed)
    half = [random.integers(VOCABULARY, size=num)]
    for _ in range(LENGTH // 2 - 1):
        below = cumulative[half[-1]] < random.random((num, 1))
        half.append(below.sum(axis=1).clip(max=VOCABULARY - 1))
    return np.tile(np.stack(half, axis=1), 2)


def train(folder: Path) -> None:
    """Write model/ and tokens.npy: a model near a minimum of its loss on the tokens."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    tokens, others = torch.from_numpy(make_tokens(NUM_SEQUENCES, 1)), torch.from_numpy(make_tokens(4096, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, TRAINING_STEPS)
    for step in range(TRAINING_STEPS):
        # The last steps are on the tokens themselves, so that w* is near a minimum of their loss.
        batch = others[torch.randint(len(others), (32,))] if step < 0.8 * TRAINING_STEPS else tokens
        next_token_losses(model, batch).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = next_token_losses(model, tokens).mean().item()
    print(f"GPT-NeoX of {model.num_parameters():,} parameters, loss {loss:.3f} nats after {TRAINING_STEPS} steps")
    model.save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", tokens.numpy())


def run_half(python: str, script: str, folder: Path, num_threads: int) -> None:
    """One half in a process of its own; what it prints is shown only if it fails."""
    threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [python, str(Path(__file__).with_name(script)), str(folder)]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def show_costs(folder: Path, settings: dict) -> None:
    """The table of time, memory and disk."""
    halves = [json.loads((folder / f"{half}.json").read_text()) for half in ("peer", "ours")]
    few, many = settings["num_draws_few"], settings["num_draws"]
    steps = settings["burn_in"] + many * settings["steps_between_draws"]
    print(
        f"\nWhat it took: {settings['num_repetitions']} repetitions of head and whole model, {settings['num_chains']} "
        f"chains of {steps} steps and {many} draws each, threads: {settings['num_threads']}"
    )
    growth = [(half["disk"]["bytes"] - half["disk_few"]["bytes"]) / (many - few) for half in halves]
    rows = [
        ("wall time, s", ".1f", [half["wall"] for half in halves]),
        ("CPU time, s", ".1f", [half["cpu"] for half in halves]),
        ("memory before sampling, MB", ".0f", [half["memory_before"] for half in halves]),
        ("peak memory, MB", ".0f", [half["memory_peak"] for half in halves]),
        (f"disk of one repetition, {few} draws, kB", ",.0f", [half["disk_few"]["bytes"] / 1e3 for half in halves]),
        (f"disk of one repetition, {many} draws, kB", ",.0f", [half["disk"]["bytes"] / 1e3 for half in halves]),
        ("disk of one draw more, B", ",.0f", growth),
        (f"files of one repetition, {many} draws", ".0f", [half["disk"]["files"] for half in halves]),
    ]
    print(f"  {'':<40}{'devinterp':>12}{'ours':>12}{'ratio':>8}")
    for name, shape, (theirs, mine) in rows:
        print(f"  {name:<40}{theirs:>12{shape}}{mine:>12{shape}}{theirs / mine:>8.2f}")
    print(COSTS)


def main() -> int:
    """Train, run both halves one after the other, compare."""
    parser = argparse.ArgumentParser(description="Parity with devinterp 2.0.1 on a small GPT-NeoX.")
    parser.add_argument("--peer-python", required=True, help="Python of a virtual environment with devinterp==2.0.1")
    parser.add_argument("--repetitions", type=int, default=12, help="of either half, for the errors of every entry")
    parser.add_argument("--draws", type=int, default=100, help="a chain")
    arguments = parser.parse_args()
    if shutil.which(arguments.peer_python) is None:
        parser.error(f"--peer-python: {arguments.peer_python} is no program; see the top of {__file__}")
    if arguments.repetitions < 4 or arguments.draws < 64:
        parser.error("at least 4 repetitions and 64 draws are needed for errors worth the name")
    settings = SETTINGS | {
        "num_repetitions": arguments.repetitions,
        "num_draws": arguments.draws,
        "num_draws_few": arguments.draws // 4,
    }
    torch.set_num_threads(settings["num_threads"])
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings))
        train(folder)
        run_half(arguments.peer_python, "parity_peer.py", folder, settings["num_threads"])
        run_half(sys.executable, "parity_ours.py", folder, settings["num_threads"])
        good = compare(folder, settings)
        show_costs(folder, settings)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
