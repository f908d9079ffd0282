"""All chains of a study on Ray: workers run them, the aggregator reduces them, the driver watches."""

from __future__ import annotations

from pathlib import Path

import ray

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.ledger import ChainRecord, Ledger
from patterning_dist.runtime.aggregator import Aggregator
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.workers import ProgressBoard, model_workers, run_tasks


def run_chains(
    config: Config, directory: Path, ledgers: dict[str, Ledger], tasks: list[tuple[str, int]], progress: Progress
) -> list[ChainRecord]:
    """Run chains side by side and write every component's statistics to its folder under ``sampling/``.

    Args:
        config: of the run.
        directory: of the run.
        ledgers: an empty ledger for every component.
        tasks: (component, chain), in the order in which they are begun.
        progress: shows a line a chain.

    Returns:
        How every task ended, in their order.

    Raises:
        PatterningError: a component has fewer healthy chains than sampling.min_chains; said as soon as it is certain.
    """
    with ray_session(config.sampling.threads_per_worker):
        aggregator, board = Aggregator.remote(ledgers), ProgressBoard.remote()
        workers = model_workers(config, directory, len(tasks))
        progress.start("sampling the posterior", sum(ledgers[name].num_draws for name, _ in tasks))

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
        ray.get([aggregator.write.remote(name, directory / "sampling" / name) for name in ledgers])
    return records


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
