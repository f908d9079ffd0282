"""What is measured of a language model while it learns, an induction circuit above all.

previous-token score   mean attention from position i to i - 1
prefix-matching score  on repeated random tokens r r: mean attention from position i of the second copy to the token
                       that followed the same token in the first copy (Olsson et al., "In-context Learning and
                       Induction Heads", 2022)
ablated gap            repeated-sequence gap where x_{l+1} = x_l + sum_{h' != h} z_h' O_h', that is z_h = 0, for the
                       head h of the largest prefix-matching score; as a control the mean over other heads of layer l
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from patterning_dist.data.induction import induction_tokens, repeated_sequences
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Joined, Part, all_losses
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.task import Metric

if TYPE_CHECKING:
    from patterning_dist.tasks.language import LanguageTask

NUM_REPEATED = 32
EVALUATION_BATCH = 16  # samples of one pass
NUM_OTHERS = 3  # heads that are ablated as a control: more would cost a pass each

LANGUAGE_METRICS: Mapping[str, Metric] = {
    "prefix_matching": Metric("prefix matching", "probability", "largest prefix-matching score of all heads", "log"),
    "induction_gap": Metric(
        "induction gap", "nats", "mean loss on tokens that complete an earlier bigram of their sequence minus the rest"
    ),
    "repeated_gap": Metric(
        "repeated-sequence gap", "nats", "mean loss on the second copy of repeated random tokens minus the first"
    ),
    "ablated_gap": Metric(
        "repeated-sequence gap without the induction head",
        "nats",
        "the gap where the output of the head of the largest prefix-matching score is set to 0",
    ),
    "other_ablated_gap": Metric(
        "repeated-sequence gap without another head",
        "nats",
        f"the same, mean over the next {NUM_OTHERS} heads of that layer, counted round: chosen without looking",
    ),
    "in_context_gap": Metric(
        "in-context gap", "nats", "mean loss on the last quarter of the context minus the second eighth"
    ),
    "induction_loss": Metric("loss on induction tokens", "nats", "mean loss on tokens that complete an earlier bigram"),
    "rest_loss": Metric("loss on the rest", "nats", "mean loss on all other tokens"),
    "validation_loss": Metric("validation loss", "nats", "mean loss on held-out tokens"),
}


@dataclass(frozen=True)
class Evaluation:
    """Held-out sequences with their masks [sequence, position], and repeated random tokens.

    Attributes:
        samples: held out.
        counted: predicted tokens that count.
        induction: of them, those that complete an earlier bigram.
        repeated: token ids [sequence, position].
    """

    samples: Part | Joined
    counted: np.ndarray
    induction: np.ndarray
    repeated: Tensor

    @classmethod
    def build(cls, task: LanguageTask, seed: int, num_sequences: int) -> Evaluation:
        """``num_sequences`` of every held-out set at most; the repeated ones are always the same (seed 0)."""
        parts, counted, induction = [], [], []
        for name, ids in held_out_ids(task, seed, num_sequences, "realised").items():
            samples = task.held_out[name]
            here, mask = induction_tokens(samples.document_tokens(ids)), samples.counted(ids)
            parts.append(Part(samples, ids))
            counted.append(np.ones_like(here) if mask is None else mask)
            induction.append(here & counted[-1])
        repeated = repeated_sequences(0, NUM_REPEATED, task.num_positions + 1, task.vocabulary_size)
        nothing = [np.zeros((0, task.num_positions), bool)]
        return cls(
            Joined(parts),
            np.concatenate(nothing + counted),
            np.concatenate(nothing + induction),
            torch.from_numpy(repeated),
        )

    def measure(self, task: LanguageTask, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """All metrics; losses in nats, scores are probabilities. Every rank calls this and does its share.

        What there is nothing to measure on, such as induction tokens in very short contexts, is left out.
        """
        measured = partial(
            all_losses, partial(task.losses, model), ranks=ranks, size=EVALUATION_BATCH, device=task.device
        )
        found = self._held_out_losses(measured(self.samples)) if len(self.samples) else {}
        half = self.repeated.shape[1] // 2
        if half > 1:
            found["repeated_gap"] = self._gap(measured(self.repeated))
            scores, prefix = self._attention_scores(task, model, ranks)
            found |= scores
            if prefix:
                found |= {"prefix_matching": max(prefix.values())} | self._ablated_gaps(task, model, ranks, prefix)
        return found

    def _gap(self, losses: Tensor) -> float:
        """Of losses of the repeated tokens [sample, position]."""
        half = self.repeated.shape[1] // 2
        # Column p predicts token p + 1; the first token of the second copy cannot be foreseen.
        return (losses[:, half:].mean() - losses[:, : half - 1].mean()).item()

    def _held_out_losses(self, losses: Tensor) -> dict[str, float]:
        position, num_positions = np.arange(losses.shape[1]), losses.shape[1]
        # At least a position each: a context may be shorter than eight tokens.
        late = position >= num_positions - max(num_positions // 4, 1)
        early = (position >= num_positions // 8) & (position < max(num_positions // 4, 1))
        masks = {
            "validation_loss": self.counted,
            "induction_loss": self.induction,
            "rest_loss": self.counted & ~self.induction,
            "late": self.counted & late,
            "early": self.counted & early,
        }
        means = {name: losses[mask].mean().item() for name, mask in masks.items() if mask.any()}
        for gap, terms in (("induction_gap", ("induction_loss", "rest_loss")), ("in_context_gap", ("late", "early"))):
            if all(name in means for name in terms):
                means[gap] = means[terms[0]] - means[terms[1]]
        return {name: mean for name, mean in means.items() if name not in ("late", "early")}

    def _attention_scores(
        self, task: LanguageTask, model: nn.Module, ranks: Ranks
    ) -> tuple[dict[str, float], dict[tuple[int, int], float]]:
        """Previous-token and prefix-matching score of every head by name, and the latter by (layer, head)."""
        half = self.repeated.shape[1] // 2
        num_heads: list[int] = []

        def scores_of(batch: Tensor) -> Tensor:  # [sample, 2 * heads of all layers]
            patterns = task.model.patterns(model, batch[:, :-1])
            num_heads[:] = [pattern.shape[1] for pattern in patterns]
            everywhere = torch.arange(1, batch.shape[1] - 1, device=batch.device)
            query = torch.arange(half, batch.shape[1] - 1, device=batch.device)
            return torch.cat(
                [
                    torch.empty(len(batch), 0, device=batch.device),
                    *(pattern[:, :, everywhere, everywhere - 1].mean(dim=2) for pattern in patterns),
                    *(pattern[:, :, query, query - half + 1].mean(dim=2) for pattern in patterns),
                ],
                dim=1,
            )

        found = all_losses(scores_of, self.repeated, ranks, EVALUATION_BATCH, task.device).mean(dim=0).tolist()
        heads = [(layer, head) for layer, number in enumerate(num_heads) for head in range(number)]
        kinds = [f"{kind}_{layer}_{head}" for kind in ("previous_token", "prefix_matching") for layer, head in heads]
        return dict(zip(kinds, found, strict=True)), dict(zip(heads, found[len(heads) :], strict=True))

    def _ablated_gaps(
        self, task: LanguageTask, model: nn.Module, ranks: Ranks, prefix: Mapping[tuple[int, int], float]
    ) -> dict[str, float]:
        """Repeated-sequence gap without the head of the largest score, and without others of its layer; nats."""
        layer, head = max(prefix, key=lambda place: prefix[place])
        num_heads = sum(other == layer for other, _ in prefix)
        heads = [(head + step) % num_heads for step in range(min(num_heads, 1 + NUM_OTHERS))]
        gaps = []
        for losses in (task.model.without_head(layer, one) for one in heads):
            if losses is None:
                return {}
            ablated = partial(losses, model)
            gaps.append(self._gap(all_losses(ablated, self.repeated, ranks, EVALUATION_BATCH, task.device)))
        found = {"ablated_gap": gaps[0]}
        return found | {"other_ablated_gap": sum(gaps[1:]) / len(gaps[1:])} if gaps[1:] else found
