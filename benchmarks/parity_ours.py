"""Our half of parity_devinterp.py: the same posterior through the Python interface, one process, no Ray.

python parity_ours.py FOLDER    # reads settings.json, model/, tokens.npy; writes ours.npz, ours.json, ours/
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from parity_meter import Meter, disk, memory
from torch import Tensor
from transformers import PreTrainedModel

from patterning_dist.aggregation.files import write_subject
from patterning_dist.aggregation.ledger import ChainRecord
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import load_language_model
from patterning_dist.models.passes import next_token_losses
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import Susceptibility, susceptibility
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.target import Target
from patterning_dist.storage.files import write_npz, write_parquet

NUM_BATCHES = 16


def sample(
    checkpoint: PreTrainedModel, component: str, tokens: Tensor, settings: dict, num_draws: int, seed: int, out: Path
) -> list[CoMoments]:
    """All chains on one component, one after another; leaves co-moments and traces as files, like a study."""
    num_sequences, num_positions = len(tokens), tokens.shape[1] - 1
    chain_settings = ChainSettings(
        posterior=Posterior(settings["inverse_temperature"], settings["localization"]),
        step_size=settings["step_size"],
        batch_size=settings["batch_size"],
        # The peer draws after the first step of an interval, we draw after its last: one step more makes them meet.
        burn_in=settings["burn_in"] + 1,
        num_draws=num_draws,
        steps_between_draws=settings["steps_between_draws"],
        seed=seed,
    )
    chains, records, traces = [], [], []
    for number in range(settings["num_chains"]):
        model = copy.deepcopy(checkpoint)  # a target moves the weights of its model
        target = Target(
            model,
            select_component(model, component),
            next_token_losses,
            tokens,
            tokens,
            num_component_losses=1,
            micro_batch_size=settings["batch_size"],
        )
        chain = Chain(target, chain_settings, number, population=num_sequences)
        moments = CoMoments.empty(number, num_draws, 1, num_sequences * (num_positions + 1), NUM_BATCHES)
        rows = []
        for draw in chain.draws():
            moments.update(draw.observables[None], draw.losses[None])
            rows.append([draw.mean_loss, *draw.observables])
        arrays = moments.state_dict() | {"center_losses": chain.center_losses}
        write_npz(out / f"chain-{number}.npz", arrays)
        chains.append(moments)
        records.append(ChainRecord(number, draws=num_draws, steps=chain.state.step))
        traces.append(np.array(rows))
    write_subject(out, ["component_loss"], records, traces)
    return chains


def estimate(
    checkpoint: PreTrainedModel, tokens: Tensor, settings: dict, num_draws: int, seed: int, out: Path
) -> Susceptibility:
    """The chains of the head and of the whole model, then chi with the peer's baseline, as a table."""
    head, full = (
        sample(checkpoint, component, tokens, settings, num_draws, seed, out / name)
        for name, component in (("head", settings["head"]), ("full", "everything"))
    )
    num_entries = tokens[:, 1:].numel()
    # L is the mean over entries; the means of sequences, which follow them, have no part in it.
    weights = np.concatenate([np.ones(num_entries), np.zeros(len(tokens))])
    found = susceptibility(head, loss_weights=weights, baseline="full", full=full)
    table = {"chi": found.chi[0, :num_entries], "se": found.standard_error[0, :num_entries]}
    write_parquet(out / "susceptibility.parquet", pa.table(table))
    return found


def main(folder: Path) -> None:
    """All repetitions, timed, and one with fewer draws for its disk."""
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["num_threads"])
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    model = load_language_model(str(folder / "model"))
    measured = {"memory_before": memory("VmRSS")}
    with Meter() as meter:
        found = [
            estimate(model, tokens, settings, settings["num_draws"], 1 + repetition, folder / "ours" / str(repetition))
            for repetition in range(settings["num_repetitions"])
        ]
    measured |= {"wall": meter.wall, "cpu": meter.cpu, "memory_peak": memory("VmHWM")}
    measured["disk"] = disk(folder / "ours" / "0")
    estimate(model, tokens, settings, settings["num_draws_few"], 0, folder / "ours" / "few")
    measured["disk_few"] = disk(folder / "ours" / "few")

    shape = len(tokens), tokens.shape[1] - 1
    num_entries = shape[0] * shape[1]
    chi, error = (
        np.stack([getattr(one, name)[0, :num_entries].reshape(shape) for one in found])
        for name in ("chi", "standard_error")
    )
    np.savez(folder / "ours.npz", chi=chi, standard_error=error)
    (folder / "ours.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
