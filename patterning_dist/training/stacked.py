"""Many small networks trained at once: one optimiser over parameters with a leading axis for the networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from patterning_dist.data.sampler import weighted_minibatch
from patterning_dist.experiments.two_rules.classifier import BracketClassifier, build_classifier, label_losses
from patterning_dist.experiments.two_rules.config import ClassifierConfig, ClassifierTrainingConfig
from patterning_dist.experiments.two_rules.strings import BracketStrings

Networks = dict[str, Tensor]  # parameter name -> [network, ...]

# Stream of the counter-based sampler, apart from those of chains.
_BATCH_STREAM = 0x737472696E6773
_EVALUATED_AT_ONCE = 2**21  # strings times networks, times positions


@dataclass(frozen=True)
class Phase:
    """Steps [start of the phase, `until`) draw strings with probabilities proportional to `weights` [sample]."""

    until: int
    weights: np.ndarray


class Stack(nn.Module):
    """The sum over networks of each one's mean loss, so that every parameter has the gradient of its own network.

    Args:
        skeleton: of one network, on the meta device.
        networks: parameters by name [network, ...].
    """

    def __init__(self, skeleton: BracketClassifier, networks: Networks) -> None:
        super().__init__()
        self._skeleton = (skeleton,)  # not a submodule: its parameters are shapes and nothing else
        self._names, self._values = list(networks), nn.ParameterList(networks.values())

    @property
    def networks(self) -> Networks:
        return dict(zip(self._names, self._values, strict=True))

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """nats; tokens [network, sample, position], lengths and labels [network, sample]."""
        return _losses(self._skeleton[0], self.networks, (tokens, lengths, labels)).mean(dim=1).sum()


class TorchEngine:
    """Forward, backward and step of a module; what a DeepSpeed engine is in one process, without its cost a step."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def __call__(self, *batch: Tensor) -> Tensor:
        return self.module(*batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class StackedTraining:
    """Networks of several seeds in training; a pure function of (configuration, seeds, phases).

    AdamW (Loshchilov & Hutter 1711.05101) on the mean loss of a minibatch of its own for every network. Networks do
    not see each other, but the last bits of a batched product depend on how many are stacked: whoever wants the same
    networks again must stack the same seeds.

    Args:
        model: sizes of a network.
        training: steps, batches and optimiser.
        strings: training strings.
        seeds: of the networks [network]; initial weights and minibatches follow from them.
        device: torch device.
        make_engine: (module, optimiser) -> what takes the steps, TorchEngine or a DeepSpeed engine.
    """

    def __init__(
        self,
        model: ClassifierConfig,
        training: ClassifierTrainingConfig,
        strings: BracketStrings,
        seeds: Sequence[int],
        device: str = "cpu",
        make_engine: Callable[[nn.Module, torch.optim.Optimizer], Any] = TorchEngine,
    ) -> None:
        self.training, self.strings, self.seeds, self.device = training, strings, list(seeds), device
        longest = strings.tokens.shape[1] - 1
        self.skeleton = BracketClassifier(model, longest).to("meta")
        stacked, _ = stack_module_state([build_classifier(model, longest, seed) for seed in seeds])
        stack = Stack(self.skeleton, {name: tensor.detach() for name, tensor in stacked.items()}).to(device)
        self.parameters = stack.networks
        self.optimizer = torch.optim.AdamW(
            stack.parameters(), betas=training.betas, weight_decay=training.weight_decay, foreach=True
        )
        self.engine = make_engine(stack, self.optimizer)
        self.step = 0

    def run(self, phases: Sequence[Phase], noted: Callable[[int], None] = lambda step: None) -> None:
        """Go on to the end of the last phase; `noted` is told every step done."""
        for phase in phases:
            cumulative = np.cumsum(phase.weights, dtype=np.float64)
            while self.step < phase.until:
                self._one_step(cumulative)
                self.step += 1
                noted(self.step)

    def networks(self) -> Networks:
        """Copies of the parameters, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.parameters.items()}

    def _one_step(self, cumulative: np.ndarray) -> None:
        settings = self.training
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, settings.warmup_steps, settings.num_steps)
        ids = np.stack(
            [weighted_minibatch(seed, _BATCH_STREAM, self.step, settings.batch_size, cumulative) for seed in self.seeds]
        )
        tokens, lengths, labels = (part.to(self.device) for part in self.strings[torch.from_numpy(ids)])
        self.engine.backward(self.engine(tokens, lengths, labels))
        self.engine.step()


def schedule(step: int, warmup: int, num_steps: int) -> float:
    """Factor of the learning rate: linear to 1 over the warm-up, then a half cosine to 0 at the end [1]."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def stacked_logits(skeleton: BracketClassifier, networks: Networks, strings: BracketStrings) -> np.ndarray:
    """Logits of "balanced" of all strings under every network [network, sample], float32."""
    device = next(iter(networks.values())).device
    num_networks = len(next(iter(networks.values())))
    size = max(1, _EVALUATED_AT_ONCE // (num_networks * strings.tokens.shape[1]))
    parts = []
    for start in range(0, len(strings), size):
        tokens, lengths, _ = (part.to(device) for part in strings[torch.arange(start, min(start + size, len(strings)))])
        with torch.no_grad():
            parts.append(vmap(lambda p, t=tokens, n=lengths: functional_call(skeleton, p, (t, n)))(networks).cpu())
    return torch.cat(parts, dim=1).numpy()


def _losses(skeleton: BracketClassifier, networks: Networks, batches: tuple[Tensor, ...]) -> Tensor:
    """Losses [network, sample] of every network on a batch of its own."""

    def one(parameters: Networks, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return label_losses(functional_call(skeleton, parameters, (tokens, lengths)), labels)

    return vmap(one)(networks, *batches)
