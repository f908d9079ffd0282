"""All chains of a study on Ray: workers run them, the aggregator reduces them, the driver watches."""

from __future__ import annotations

import contextlib
from pathlib import Path

import ray

from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.ledger import ChainRecord, Ledger
from patterning_dist.runtime.aggregator import Aggregator
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.groups import chain_workers
from patterning_dist.runtime.workers import MakeStudy, ProgressBoard, run_tasks


def run_chains(
    make_study: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    folder: Path,
    ledgers: dict[str, Ledger],
    tasks: list[tuple[str, int]],
    progress: Progress,
) -> list[ChainRecord]:
    """Run chains side by side and write every unit's statistics to its own folder, as soon as its chains are through.

    Args:
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        folder: ``sampling/`` of the run directory.
        ledgers: an empty ledger for every unit, a set of chains on one component.
        tasks: (unit, chain), in the order in which they are begun.
        progress: shows a line a chain.

    Returns:
        How every task ended, in their order.

    Raises:
        PatterningError: a unit has fewer healthy chains than sampling.min_chains; said as soon as it is certain.
    """
    with contextlib.ExitStack() as resources:
        resources.enter_context(ray_session(sampling.threads_per_worker))
        aggregator, board = Aggregator.remote(ledgers), ProgressBoard.remote()
        workers = resources.enter_context(chain_workers(make_study, sampling, device, len(tasks), progress))
        progress.start("sampling the posterior", sum(ledgers[unit].num_draws for unit, _ in tasks))
        written: dict[str, ray.ObjectRef] = {}

        def poll(records: list[ChainRecord | None]) -> None:
            for key, note in sorted(ray.get(board.read.remote()).items()):
                progress.update_line(key, **note)
            progress.update(ray.get(aggregator.num_draws.remote()))
            _refuse_hopeless(sampling.min_chains, tasks, records)
            unfinished = {unit for (unit, _), record in zip(tasks, records, strict=True) if record is None}
            for unit in ledgers.keys() - unfinished - written.keys():
                written[unit] = aggregator.write.remote(unit, folder / unit)

        calls = [
            lambda worker, unit=unit, chain=chain: worker.chain.remote(unit, chain, aggregator, board)
            for unit, chain in tasks
        ]
        records = run_tasks(workers, calls, poll)
        ray.get(list(written.values()))
    return records


def _refuse_hopeless(min_chains: int, tasks: list[tuple[str, int]], records: list[ChainRecord | None]) -> None:
    for unit in dict.fromkeys(unit for unit, _ in tasks):
        mine = [r for (name, _), r in zip(tasks, records, strict=True) if name == unit]
        failed = [r for r in mine if r is not None and not r.healthy]
        if failed and len(mine) - len(failed) < min_chains:
            raise PatterningError(
                f"component {unit}: {len(failed)} of {len(mine)} chains failed, so fewer than "
                f"sampling.min_chains = {min_chains} can be healthy; "
                f"chain {failed[0].chain}: {failed[0].reason}"
            )
