"""`patterning submit`: an experiment as a Ray job, which the same command attaches to while it runs, or resumes.

A run is known by its run directory: attempt N at it is the job `patterning-<name>-<hash of the run directory>-N`. A
cluster forgets its jobs when it is lost; the run directory does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patterning_dist.config import Root
from patterning_dist.errors import PatterningError, last_line
from patterning_dist.runtime.jobs.client import LOST, connect
from patterning_dist.runtime.jobs.files import pack_job

if TYPE_CHECKING:  # `connect` imports ray
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

_SILENCE = 60.0  # seconds without a line of the log after which the connection may be a dead one
_PATIENCE = 30.0  # seconds without an answer after which the cluster counts as lost
# `ray job stop` kills after three seconds otherwise: a run needs longer to write its checkpoints.
_STOP_SECONDS = 40


def submit_run(experiment: Path, overrides: Sequence[str], run_dir: str | None, address: str, follow: bool) -> int:
    """Run an experiment as a job of a cluster, or attach to the job that runs it already.

    Args:
        experiment: file, or a run directory to take up again.
        overrides: as of ``load_config``.
        run_dir: absolute path on storage that all nodes share, or a URL; None: as the experiment says.
        address: of the cluster's job server, http://HOST:8265.
        follow: show the log until the job has ended.

    Returns:
        Exit code: of the job if it was followed to its end, else 0.

    Raises:
        PatterningError: a fault in the experiment, no answer or a refusal of the cluster.
    """
    if experiment.is_dir():
        experiment, run_dir = experiment / "config.yaml", run_dir or str(experiment)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "job.zip"
        config, contents = pack_job(experiment, overrides, archive)
        run_dir = _durable(experiment, config, run_dir)
        client = connect(address)
        job = _running_or_new(client, address, experiment, config, run_dir, archive, contents)
    if not follow:
        return 0
    try:
        details = _follow(client, address, job)
    except KeyboardInterrupt:
        _say(f"{job} goes on; to follow it again: the same command. To stop it: ray job stop {job} --address {address}")
        return 130
    return _exit_code(job, details)


def _durable(experiment: Path, config: Root, run_dir: str | None) -> str:
    location = run_dir or (str(config.run_dir) if config.run_dir else "")
    if "://" not in location and not location.startswith("/"):
        raise PatterningError(
            f"{experiment}: a job needs a run directory that outlives it, got {location or 'none'}; give --run-dir an "
            "absolute path on storage that all nodes share, or a URL"
        )
    return location.rstrip("/") if "://" in location else os.path.normpath(location)


def _running_or_new(
    client: JobSubmissionClient,
    address: str,
    experiment: Path,
    config: Root,
    run_dir: str,
    archive: Path,
    contents: Sequence[str],
) -> str:
    """The job that is at this run directory already, or else a new one, whose contents are said first."""
    run = f"patterning-{config.name}-{hashlib.sha256(run_dir.encode()).hexdigest()[:8]}"
    entrypoint = shlex.join(["python", "-m", "patterning_dist", "run", experiment.name, "--run-dir", run_dir])
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    refusal = None
    for _ in range(3):  # another submission may be quicker, and have the number
        attempts = {
            int(match[1]): details
            for details in client.list_jobs()
            if (match := re.fullmatch(re.escape(run) + r"-(\d+)", details.submission_id or ""))
        }
        for number, details in attempts.items():
            if not details.status.is_terminal():
                job = f"{run}-{number}"
                _say(f"{job} is running already at {run_dir}: attached to it")
                if (details.metadata or {}).get("files") != digest:
                    _say(
                        "note: it was submitted with other settings or files; to run with these, stop it (ray job stop "
                        f"{job} --address {address}) and submit again"
                    )
                return job
        number = max(attempts, default=0) + 1
        if refusal is None:
            _say("\n".join(contents))
        try:
            job = client.submit_job(
                entrypoint=entrypoint,
                submission_id=f"{run}-{number}",
                runtime_env={
                    "working_dir": str(archive),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
                },
                metadata={"run_dir": run_dir, "files": digest},
            )
        except LOST as error:
            refusal = error
            continue
        _say(f"{job} is submitted to {address}; it keeps its run in {run_dir}")
        return job
    raise PatterningError(
        f"{address}: refused the job ({last_line(refusal)}); see the dashboard's log on the head node"
    )


def _follow(client: JobSubmissionClient, address: str, job: str) -> JobDetails:
    """Show the log of a job until it has ended, across connections that break."""
    position, silent_since = 0, None
    while True:
        position = asyncio.run(_show_log(client, job, position))
        try:
            details = client.get_job_info(job)
        except LOST as error:
            silent_since = silent_since or time.monotonic()
            # 404: another cluster answers there, which does not know the job.
            if "status code 404" in str(error) or time.monotonic() - silent_since > _PATIENCE:
                raise PatterningError(
                    f"{address}: the cluster is lost, or out of reach ({last_line(error)}); when there is one again, "
                    "the same command goes on from the run directory"
                ) from None
            time.sleep(1)
            continue
        silent_since = None
        if details.status.is_terminal():
            asyncio.run(_show_log(client, job, position))  # the rest, if the connection broke at the end
            return details
        time.sleep(1)


async def _show_log(client: JobSubmissionClient, job: str, position: int) -> int:
    """Print the log from a position [characters] on, until it ends or the connection does; returns where that was."""
    seen = 0
    try:
        async with asyncio.timeout(_SILENCE) as limit:
            async for chunk in client.tail_job_logs(job):
                limit.reschedule(asyncio.get_running_loop().time() + _SILENCE)
                seen += len(chunk)
                if seen > position:
                    print(chunk[position - seen :], end="", flush=True)
                    position = seen
    except LOST:
        pass  # the status of the job says what it means
    return position


def _exit_code(job: str, details: JobDetails) -> int:
    if details.status == "SUCCEEDED":
        _say(f"{job} is done")
        return 0
    code = details.driver_exit_code
    if details.status == "STOPPED":
        _say(f"{job} was stopped; the same command goes on from the run directory")
    elif code is None:
        _say(f"{job} failed: {last_line(details.message or 'no reason given')}")
    elif code == 127:
        _say(f"{job} failed: no `python` where Ray runs; start Ray with the environment's bin folder on its PATH")
    else:
        _say(f"{job} failed with exit code {code}, see above; put that right, and the same command goes on")
    return code or 1


def _say(text: str) -> None:
    """A line of our own, apart from the log of the job."""
    print(text, file=sys.stderr, flush=True)
