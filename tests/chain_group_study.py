"""What workers and ranks hold in ``test_chain_groups``: chains on a small model, and some that come to grief."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist
from chain_group_script import CONTEXT, PROBE, TOKENS, VOCABULARY, squared_norm

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import select_component
from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.shard import shard_model
from patterning_dist.sampling.target import Target


def kill_rank_1(model):
    """An observable whose process is killed as by the kernel, for want of memory."""
    if dist.is_initialized() and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(1)


def raise_on_rank_1(model):
    """An observable with a bug that only one rank runs into."""
    if dist.is_initialized() and dist.get_rank() == 1:
        raise ValueError("a bug of the user's own")
    return torch.zeros(1)


def refuse(rank):
    raise PatterningError("model.path: there is no such folder")


class Striking:
    """``squared_norm``, but that a rank is killed once, in the sixth draw; how often rank 0 is asked later is noted.

    Between two draws all ranks write checkpoints and delete those that are not needed, so that here they have the same.

    Args:
        folder: where it is noted that the rank was killed.
        number: of the chain; chain 0 loses rank 1, and chain 1 loses rank 0.
        rank: this one.
    """

    def __init__(self, folder, number, rank):
        self.folder, self.number, self.rank = folder, number, rank
        self.is_first, self.num_calls = not (folder / f"struck-{number}").exists(), 0

    def __call__(self, model):
        self.num_calls += 1
        if self.is_first and self.num_calls == 7 and self.rank == 1 - self.number:  # the first call is at the centre
            (self.folder / f"struck-{self.number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.is_first and self.rank == 0:
            (self.folder / f"calls-{self.number}").write_text(str(self.num_calls))
        first, second = (self._checkpoints(rank) for rank in (0, 1))
        assert first == second, (first, second)
        return squared_norm(model)

    def _checkpoints(self, rank):
        found = self.folder.glob(f"sampling/group/struck/checkpoints/chain-{self.number}-rank-{rank}.*")
        return sorted(int(path.name.split(".")[1]) for path in found)


class GroupStudy:
    """Units are "<who runs it>/<kind>"; kinds differ in the observable or in the step size, and in nothing else."""

    observables = ("component", "function")
    num_draws = 9

    def __init__(self, device, ranks, folder=None):
        self.device, self.ranks, self.folder = device, ranks, folder

    def chain(self, subject, number):
        kind = subject.partition("/")[2]
        if kind == "refused":
            raise PatterningError("model.path: there is no such folder")
        model = AttentionOnlyTransformer(
            AttentionOnlyConfig(num_layers=2, num_heads=3, d_model=10, d_head=3), VOCABULARY, CONTEXT, seed=1
        )
        target = Target(
            shard_model(model, self.ranks, self.device),
            select_component(model, "layer.0.head.1+unembedding"),
            lambda model, tokens: token_losses(model(tokens[:, :-1]), tokens),
            TOKENS,
            PROBE,
            functions=(self._function(kind, number),),
            num_component_losses=1,
            ranks=self.ranks,
        )
        step_size = 1.0 if kind == "diverging" else 1e-3
        settings = ChainSettings(Posterior(30.0, 20.0), step_size, 5, 2, self.num_draws, 1, seed=7)
        return Chain(target, settings, number, population=len(TOKENS))

    def _function(self, kind, number):
        if kind == "struck":
            return Striking(self.folder, number, self.ranks.rank)
        if kind == "mortal":
            return kill_rank_1 if number == 1 else squared_norm
        return {"killed": kill_rank_1, "raising": raise_on_rank_1}.get(kind, squared_norm)
