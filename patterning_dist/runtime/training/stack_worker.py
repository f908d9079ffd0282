"""Training stacks of small networks on a worker, one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from patterning_dist.config.deepspeed import deepspeed_config
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import Notes
from patterning_dist.runtime.training.engine import initialize_alone
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import stage_fingerprint
from patterning_dist.training.stack import Networks, TorchEngine
from patterning_dist.training.stacked import Phase, StackedTraining, StackSettings


@dataclass(frozen=True)
class StackRecipe:
    """What the stacks of a run have in common; goes to every worker.

    Attributes:
        open_task: (run directory, device) -> the task, see ``Stackable``.
        files: names in the run directory that it reads.
        behaviour: (task, one network, all networks) -> what they do, columns [network].
        settings: of every training.
        engine: what takes the steps; DeepSpeed (ZeRO stage 0) costs more a step, for large networks.
    """

    open_task: Callable[[Path, str], Any]
    files: tuple[str, ...]
    behaviour: Callable[[Any, nn.Module, Networks], dict[str, np.ndarray]]
    settings: StackSettings
    engine: Literal["torch", "deepspeed"] = "torch"


@dataclass(frozen=True)
class StackTask:
    """Networks that are trained together.

    Attributes:
        arm: name of what they are trained for.
        seeds: of the networks.
        phases: of the training; the weights are [sample].
    """

    arm: str
    seeds: tuple[int, ...]
    phases: tuple[Phase, ...]

    @property
    def key(self) -> str:
        return f"{self.arm} seeds {self.seeds[0]} to {self.seeds[-1]}"

    def fingerprint(self, inputs: str) -> str:
        """Hash of what the networks follow from; `inputs`: of the task and the settings."""
        phases = [[phase.until, np.asarray(phase.weights, "<f8").tobytes().hex()] for phase in self.phases]
        return stage_fingerprint("stack", {"inputs": inputs, "seeds": list(self.seeds), "phases": phases})


@dataclass(frozen=True)
class Trained:
    """Networks after their training: parameters by name [network, ...], and what they do, columns [network]."""

    parameters: dict[str, np.ndarray]
    behaviour: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything in one dict, parameters/<name> and behaviour/<name>."""
        found = {f"parameters/{name}": values for name, values in self.parameters.items()}
        return found | {f"behaviour/{name}": values for name, values in self.behaviour.items()}

    @staticmethod
    def of(arrays: dict[str, np.ndarray]) -> Trained:
        """The inverse of ``arrays``."""

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {n.removeprefix(prefix): values for n, values in arrays.items() if n.startswith(prefix)}

        return Trained(under("parameters/"), under("behaviour/"))


def open_stacks(recipe: StackRecipe, location: Location, device: str, ranks: Ranks) -> Any:
    """The task, in the worker that is to train; what a ``ModelWorker`` calls its study."""
    return recipe.open_task(location.fetch(*recipe.files), device)


def train_stack(worker: Any, recipe: StackRecipe, stack: StackTask, board: ActorHandle) -> dict[str, np.ndarray]:
    """Train a stack from fresh weights; returns ``Trained.arrays``.

    Raises:
        PatterningError: a network's parameters are not finite.
    """
    settings, task, device = recipe.settings, worker.study, worker.device
    make_engine: Callable[..., Any] = TorchEngine
    if recipe.engine == "deepspeed":
        # DeepSpeed counts samples; those of one network are what it has to know of. By default it clips gradients,
        # here by the norm over all networks: each one's steps would depend on the others.
        engine = deepspeed_config(None, settings.batch_size, 1) | {"gradient_clipping": 0.0}
        make_engine = partial(initialize_alone, config=engine, device=device)
    training = StackedTraining(task, settings, stack.seeds, device, make_engine)
    training.run(stack.phases, Notes(board, stack.key, settings.num_steps))
    networks = {name: tensor.numpy() for name, tensor in training.networks().items()}
    _refuse_not_finite(stack, networks)
    return Trained(networks, recipe.behaviour(task, training.skeleton, training.parameters)).arrays()


def _refuse_not_finite(stack: StackTask, networks: dict[str, np.ndarray]) -> None:
    for name, values in networks.items():
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        if len(bad):
            raise PatterningError(
                f"arm {stack.arm}: {name} of the network of seed {stack.seeds[bad[0]]} is not finite after training; "
                "lower training.learning_rate"
            )
