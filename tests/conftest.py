"""What tests of several folders share; the option that writes golden numbers, and how near this machine's are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from golden.compare import Compare, compare, write
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: tests are small, and threads that wait for each other only cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers yield to everything else of the machine by default, and tests wait for them with deadlines.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A submit in this process would turn token authentication on where there is a token: for good, also for the drivers of
# tests to come, whose actors a cluster without one cancels, since it cannot ask whether they are still wanted.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

# What shares a cluster or a finished run goes to one process.
TOGETHER = {
    "tests/end_to_end/test_damaged_outputs.py": "the whole loop",
    "tests/end_to_end/test_pipeline.py": "the whole loop",
    "tests/end_to_end/test_remote_run.py": "the whole loop",
    "tests/end_to_end/test_signals.py": "the whole loop",
}
# Seconds of what takes longest, on two cores with both processes at work: begun first, so that both end together.
SECONDS = {
    "the whole loop": 420,
    "tests/end_to_end/test_matrix.py": 480,
    "tests/golden/test_golden.py": 175,
    "tests/fault": 130,
    "tests/end_to_end/test_submit.py": 100,
    "tests/ray/test_chain_groups.py": 150,
    "tests/ray/test_retraining.py": 190,
    "tests/end_to_end/test_study.py": 185,
    "tests/end_to_end/test_parentheses.py": 180,
    "tests/ray/test_training_tasks.py": 105,
    "tests/end_to_end/test_outside_experiment.py": 105,
    "tests/end_to_end/test_plan.py": 90,
    "tests/unit/test_plan_without_gpus.py": 50,
    "tests/unit/test_plan_memory.py": 25,
    "tests/unit/test_footprint.py": 20,
    "tests/unit/test_field_figures.py": 20,
    "tests/unit/test_docstring_examples.py": 15,
    "tests/unit/test_trackers.py": 15,
    "tests/end_to_end/test_calibrate.py": 45,
    "tests/end_to_end/test_given_text_and_adapter.py": 50,
    "tests/ray/test_predict.py": 140,
    "tests/ray/test_validate.py": 120,
    "tests/ray/test_rounds.py": 90,
    "tests/ray/test_first_moment_weights.py": 70,
    "tests/ray/test_check.py": 40,
    "tests/ray/test_doctor.py": 30,
    "tests/ray/test_actors.py": 85,
    "tests/unit/test_deaths.py": 50,
    "tests/unit/test_zero_layouts.py": 50,
    "tests/fuzz/test_fuzz.py": 60,
    "tests/unit/test_around.py": 40,
    "tests/unit/test_export.py": 20,
    "tests/unit/test_response_columns.py": 25,
    "tests/ray/test_stacks.py": 25,
    "tests/ray/test_strangers.py": 60,
    "tests/end_to_end/test_own_model.py": 25,
    "tests/unit/test_anatomy.py": 25,
    "tests/unit/test_checkpoint_files.py": 20,
    "tests/ray/test_metrics.py": 20,
    "tests/ray/test_trials.py": 20,
    "tests/statistical/test_calibrated_settings.py": 40,
    "tests/statistical/test_controlled.py": 25,
    "tests/statistical/test_llc_models.py": 15,
    "tests/statistical/test_llc_response.py": 15,
    "tests/statistical/test_rmsprop_sgld_gaussian.py": 15,
    "tests/statistical/test_selftest.py": 45,
    "tests/statistical/test_sgnht_gaussian.py": 15,
    "tests/statistical/test_sign_trap.py": 15,
}


def scope_of(nodeid: str) -> str:
    """Tests of one scope run in one process, one after another."""
    file = nodeid.split("::")[0]
    return "tests/fault" if file.startswith("tests/fault/") else TOGETHER.get(file, file)


class LongestFirst(LoadScopeScheduling):
    """With ``-n 2`` each process takes one scope after another, the longest first; each has a Ray of its own."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LongestFirst:
    config.option.loadscopereorder = False
    return LongestFirst(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -SECONDS.get(scope_of(item.nodeid), 0))  # stable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="write tests/golden/*.json; say why in the changelog")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        for name, value in report.user_properties:
            if name == "golden" and report.when == "call":
                terminalreporter.write_line(f"golden {value}")


@pytest.fixture
def golden(pytestconfig: pytest.Config, record_property: Callable[[str, object], None]) -> Compare:
    """Holds arrays of a kind against those of its file, or writes these."""

    def checked(kind: str, arrays: dict[str, np.ndarray]) -> None:
        if pytestconfig.getoption("--golden-update"):
            write(kind, arrays)
        record_property("golden", compare(kind, arrays))

    return checked


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with data and a checkpoint; ``tiny_run.copy_run`` copies it for stages to run in."""
    from tiny_run import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ray on this machine with two CPUs, for all tests of this process that need no other."""
    from shared_ray import start_cluster

    folder = tmp_path_factory.mktemp("word")
    with pytest.MonkeyPatch.context() as patch:
        cluster = start_cluster(patch, folder, num_cpus=2)
    os.environ["TESTS_FOLDER"] = str(folder)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def local_ray(ray_address: str) -> Iterator[None]:
    """This process is a driver on ``ray_address``, for all tests of a module."""
    from shared_ray import joined

    with joined(ray_address):
        yield
