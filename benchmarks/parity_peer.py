"""The peer's half of parity_devinterp.py. Runs in the interpreter that has devinterp, and imports nothing of ours.

python parity_peer.py FOLDER    # reads settings.json, model/, tokens.npy; writes peer.npz, peer.json, peer/
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from datasets import Dataset
from devinterp.optim import SGMCMC
from devinterp.slt.susceptibilities import susceptibilities
from devinterp.slt.weight_restrictions import create_param_masks
from parity_meter import Meter, disk, memory
from transformers import GPTNeoXForCausalLM

NUM_COMPARED_STEPS = 5


def estimate(model, dataset: Dataset, settings: dict, num_draws: int, seed: int, folder: Path) -> xr.DataTree:
    """One call of the peer's own entry point: the chains of the head and of the whole model, then chi.

    Settings that keep clear of its known faults: L(w*) over all of the probe and nothing else (its default is the mean
    of the first 32 shuffled minibatches), and minibatches of their own for every chain (its default is shared ones).
    """
    batches = len(dataset) // settings["batch_size"]
    return susceptibilities(
        model,
        dataset,
        observables={"probe": (dataset, batches)},
        weight_restrictions={"full": None, "head": create_param_masks(model, settings["peer_head"])},
        sampling_task="probe",
        include_sampling_task=True,
        lr=settings["step_size"],
        n_beta=settings["inverse_temperature"],
        localization=settings["localization"],
        num_chains=settings["num_chains"],
        num_draws=num_draws,
        num_burnin_steps=settings["burn_in"],
        num_steps_bw_draws=settings["steps_between_draws"],
        batch_size=settings["batch_size"],
        num_init_loss_batches=batches,
        match_sampling_input_ids_across_chains=False,
        init_seed=seed,
        output_path=folder / "samples.zarr",
        device="cpu",
    )


def in_order_of_tokens(result: xr.DataTree, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """chi [sequence, position] in the order of ``tokens``, and where the peer keeps each of those sequences."""
    ids = result["context"]["input_ids"].values.reshape(tokens.shape)
    place = {row.tobytes(): i for i, row in enumerate(ids.astype(tokens.dtype))}
    order = np.array([place[row.tobytes()] for row in tokens])
    return result["susceptibilities"]["sus"].values[:, 0].reshape(len(tokens), -1)[order], order


def steps_of_the_sampler(model, tokens: torch.Tensor, settings: dict) -> dict[str, np.ndarray]:
    """Positions, gradients and noise of a few masked steps of the peer's SGLD, for a comparison step by step."""
    masks = create_param_masks(model, settings["peer_head"])
    parameters = dict(model.named_parameters())
    sampler = SGMCMC.sgld(
        [{"params": parameters[name], "mask": mask} for name, mask in masks.items()],
        lr=settings["step_size"],
        nbeta=settings["inverse_temperature"],
        localization=settings["localization"],
    )
    found = {f"mask/{name}": mask.numpy() for name, mask in masks.items()}
    for step in range(NUM_COMPARED_STEPS):
        model(tokens, labels=tokens).loss.backward()
        ours, theirs = (torch.Generator().manual_seed(step) for _ in range(2))
        for name in masks:
            found[f"{step}/before/{name}"] = parameters[name].detach().numpy().copy()
            found[f"{step}/gradient/{name}"] = parameters[name].grad.numpy().copy()
            found[f"{step}/noise/{name}"] = torch.normal(0.0, 1.0, parameters[name].shape, generator=ours).numpy()
        sampler.step(noise_generator=theirs)
        sampler.zero_grad()
        for name in masks:
            found[f"{step}/after/{name}"] = parameters[name].detach().numpy().copy()
    return found


def main(folder: Path) -> None:
    """All repetitions, timed; then what the comparison needs beside chi."""
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["num_threads"])
    tokens = np.load(folder / "tokens.npy")
    dataset = Dataset.from_dict({"input_ids": tokens}).with_format("torch")
    model = GPTNeoXForCausalLM.from_pretrained(folder / "model")
    measured = {"devinterp": version("devinterp"), "torch": torch.__version__, "memory_before": memory("VmRSS")}
    found: dict[str, np.ndarray] = {}

    chi = []
    with Meter() as meter, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for repetition in range(settings["num_repetitions"]):
            # Chain c takes seed + c for its noise and its minibatches.
            out, seed = folder / "peer" / str(repetition), 1000 * (1 + repetition)
            result = estimate(model, dataset, settings, settings["num_draws"], seed, out)
            values, order = in_order_of_tokens(result, tokens)
            chi.append(values)
    measured |= {"wall": meter.wall, "cpu": meter.cpu, "memory_peak": memory("VmHWM")}
    # It leaves a chain that failed as a warning and NaN: here a failure must be seen.
    measured["warnings"] = sorted({str(w.message) for w in caught if "failed" in str(w.message)})
    measured["disk"] = disk(folder / "peer" / "0")

    estimate(model, dataset, settings, settings["num_draws_few"], 0, folder / "peer" / "few")
    measured["disk_few"] = disk(folder / "peer" / "few")

    for name in ("head", "full"):
        tree = xr.open_datatree(folder / "peer" / "0" / f"samples_{name}.zarr", engine="zarr", consolidated=False)
        found[f"losses_{name}"] = tree["loss_probe"].values[:, :, order]  # chain draw sequence position
        found[f"init_loss_{name}"] = tree["init_loss"].values
    found |= steps_of_the_sampler(model, torch.from_numpy(tokens), settings)
    np.savez(folder / "peer.npz", chi=np.stack(chi), **found)
    (folder / "peer.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
