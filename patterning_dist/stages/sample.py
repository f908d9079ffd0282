"""Stage ``sample``: the checkpoint w* -> posterior chains -> co-moments -> susceptibilities with errors."""

from __future__ import annotations

from pathlib import Path

import ray

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.ledger import ChainRecord, Ledger
from patterning_dist.rundir import RunDirectory
from patterning_dist.runtime.aggregator import Aggregator
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.workers import ProgressBoard, model_workers, run_tasks
from patterning_dist.sampling.study import Study
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
    with ray_session(settings.threads_per_worker):
        aggregator, board = Aggregator.remote(ledgers), ProgressBoard.remote()
        workers = model_workers(config, run.path, len(tasks))
        progress.start("sampling the posterior", sum(planned[name].num_draws for name, _ in tasks))

        def poll(records: list[ChainRecord | None]) -> None:
            for key, note in sorted(ray.get(board.read.remote()).items()):
                progress.update_line(key, **note)
            progress.update(ray.get(aggregator.num_draws.remote()))
            _refuse_hopeless(config, tasks, records)

        calls = [
            lambda worker, name=name, chain=chain: worker.chain.remote(name, chain, aggregator, board)
            for name, chain in tasks
        ]
        records = run_tasks(workers, calls, poll)
        ray.get([aggregator.write.remote(name, run.path / "sampling" / name) for name in components])
    for (name, _), record in zip(tasks, records, strict=True):
        if not record.healthy:
            run.event("sample", "chain_excluded", component=name, chain=record.chain, reason=record.reason)
    outputs = [
        run.path / "sampling" / name / file
        for name in components
        for file in ("moments.npz", "traces.parquet", "arrays.npz", "chains.json")
    ]
    return outputs + write_susceptibilities(study, run)


def _refuse_hopeless(config: Config, tasks: list[tuple[str, int]], records: list[ChainRecord | None]) -> None:
    for component in config.sampling.components:
        mine = [r for (name, _), r in zip(tasks, records, strict=True) if name == component.name]
        failed = [r for r in mine if r is not None and not r.healthy]
        if failed and len(mine) - len(failed) < config.sampling.min_chains:
            raise PatterningError(
                f"component {component.name}: {len(failed)} of {len(mine)} chains failed, so fewer than "
                f"sampling.min_chains = {config.sampling.min_chains} can be healthy; "
                f"chain {failed[0].chain}: {failed[0].reason}"
            )
