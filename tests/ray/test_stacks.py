"""Stacks of networks on Ray: whatever takes the steps, and however often it is asked, the networks are the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_run import quiet

from patterning_dist.config import load_config
from patterning_dist.experiments.two_rules.behaviour import behaviour
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.strings import read_split, write_splits
from patterning_dist.experiments.two_rules.task import BracketTask
from patterning_dist.runtime.training.stack_worker import StackRecipe, StackTask, Trained
from patterning_dist.runtime.training.stacks import train_stacks
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.stacked import Phase, StackSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

CONFIG = Path(__file__).parents[2] / "configs" / "parentheses-small.yaml"
SMALL = ("training.num_steps=20", "training.warmup_steps=5", "task.num_balanced=40", "task.num_unequal=80")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacks")
    write_splits(folder / "data", load_config(CONFIG, SMALL).task, seed=0)
    return folder


def train(config: ParenthesesConfig, folder: Path, stacks: Path, inputs: str = "a") -> list[Trained]:
    strings = read_split(folder / "data", "train", config.task.max_length)
    uneven = np.linspace(0.1, 2, len(strings)) * strings.class_weights
    tasks = [
        StackTask("plain", (0, 1, 2), (Phase(20, strings.class_weights),)),
        StackTask("uneven", (0, 1, 2), (Phase(12, uneven), Phase(20, strings.class_weights))),
    ]
    settings = StackSettings(**config.training.model_dump(include={*StackSettings._fields}))
    recipe = StackRecipe(partial(BracketTask, config), ("data",), behaviour, settings, config.training.engine)
    run, sampling = RunDirectory(folder), config.sampling
    with quiet() as progress:
        return train_stacks(recipe, sampling, "cpu", run, inputs, tasks, str(stacks), progress)


def assert_same(first: list[Trained], second: list[Trained]) -> None:
    for one, other in zip(first, second, strict=True):
        for name, values in one.parameters.items():
            np.testing.assert_array_equal(values, other.parameters[name], err_msg=name)


def test_deepspeed_takes_the_steps_of_torch(folder: Path) -> None:
    """Bit for bit, with gradients longer than the norm at which DeepSpeed clips by default."""
    plain, deepspeed = (
        train(load_config(CONFIG, [*SMALL, f"training.engine={engine}"]), folder, Path(engine))
        for engine in ("torch", "deepspeed")
    )
    assert_same(plain, deepspeed)
    assert not np.array_equal(plain[0].parameters["head.weight"], plain[1].parameters["head.weight"])


def test_stacks_that_are_there_are_not_trained_again(folder: Path) -> None:
    config = load_config(CONFIG, SMALL)
    first = train(config, folder, Path("kept"))
    (folder / "kept" / "uneven-0.npz").unlink()
    stamp = (folder / "kept" / "plain-0.npz").stat().st_mtime_ns
    assert_same(first, train(config, folder, Path("kept")))
    assert (folder / "kept" / "plain-0.npz").stat().st_mtime_ns == stamp
    train(config, folder, Path("kept"), inputs="others")
    assert (folder / "kept" / "plain-0.npz").stat().st_mtime_ns != stamp
