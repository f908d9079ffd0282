"""Stage ``sample``: the checkpoint w* -> posterior chains -> co-moments -> susceptibilities with errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from patterning_dist.config import Config
from patterning_dist.progress import Progress
from patterning_dist.response.ledger import Ledger
from patterning_dist.rundir import RunDirectory
from patterning_dist.runtime.chains import run_chains
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.study import Study, open_study
from patterning_dist.stages.susceptibilities import write_susceptibilities


def sample(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Run every chain of every component on Ray actors and write their statistics; returns the files written.

    Raises:
        PatterningError: a component has fewer healthy chains than sampling.min_chains; said as soon as it is certain.
    """
    settings = config.sampling
    study = Study(config, run.path, resolve_device(config.device))
    components = [c.name for c in settings.components]
    planned = {name: settings.resolve(name) for name in components}
    num_columns = study.probe_tokens.shape[0] * study.probe_tokens.shape[1]  # per-token losses, then one a sequence
    ledgers = {
        name: Ledger(study.observable_names, num_columns, planned[name].num_draws, settings.num_batches)
        for name in components
    }
    # The direction's component also takes gradients at every draw: its chains are the longest, so they go first.
    order = sorted(components, key=lambda name: name != config.response.direction.component)
    tasks = [(name, chain) for name in order for chain in range(planned[name].num_chains)]
    records = run_chains(
        partial(open_study, config, run.path), settings, study.device, run.path / "sampling", ledgers, tasks, progress
    )
    for (name, _), record in zip(tasks, records, strict=True):
        if not record.healthy:
            run.event("sample", "chain_excluded", component=name, chain=record.chain, reason=record.reason)
    outputs = [
        run.path / "sampling" / name / file
        for name in components
        for file in ("moments.npz", "traces.parquet", "arrays.npz", "chains.json")
    ]
    return outputs + write_susceptibilities(study, run)
