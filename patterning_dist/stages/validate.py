"""Stage ``validate``: what scores of training samples predict, against retrainings without these samples.

LDS on random subsets, QLD without the samples (or single losses) that a method singles out; see ``response.lds``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.config import Config
from patterning_dist.config.validation import RANDOM
from patterning_dist.data.bergson import read_subsets, write_scores, write_validation
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.lds import (
    Score,
    ceiling,
    linear_datamodeling_score,
    mean_over_queries,
    removed_sums,
    strongest,
)
from patterning_dist.runtime.attribution import retrained_losses
from patterning_dist.stages.attribution import STAGE, Attribution, of_samples
from patterning_dist.stages.bank import BASE, FOLDER, Bank, Removal, draw_subsets, subset_name
from patterning_dist.storage.files import file_sha256, write_json
from patterning_dist.storage.run import RunDirectory

RESULT = f"{FOLDER}/summary.json"
Scores = dict[str, np.ndarray]  # by method, see Attribution.scores
Kind = str  # of QLD: qld or token_qld


def validate(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Train the bank, score the training samples, and compare; returns the files written.

    Raises:
        PatterningError: a bank or a folder of scores is of other data; single losses are to be removed, and a sample
            has one; or what trainings and chains raise.
    """
    run.location.fetch(FOLDER, "data", *config.checkpoints)
    attribution = Attribution(config, run)
    settings, methods = attribution.settings, [*attribution.settings.methods, *attribution.settings.scores, RANDOM]
    if attribution.tokens and attribution.counted is None:
        raise PatterningError(
            "validation.removed_token_share: a sample has one loss in this task; set removed_share instead"
        )
    files, models, removed = attribution.sample(progress), dict[str, str](), list[np.ndarray]()
    if settings.bank is not None:
        removed = read_subsets(settings.bank, attribution.num_samples)
        models = bank_models(settings.bank, len(removed))
        num_seeds, bank = 1, None
    else:
        removed = draw_subsets(config.seed, attribution.num_samples, settings.num_subsets, settings.subset_share)
        bank, num_seeds = Bank(config, run, attribution.start, progress), len(settings.seeds)
        subsets = [Removal(subset_name(number), ids) for number, ids in enumerate(removed)]
        trained, models = bank.train("retraining on subsets", [None, *subsets])
        files += [*bank.write_subsets(removed), *trained]
    with attribution.tasks(progress) as run_calls:
        scores = {name: attribution.scores(run_calls, name) for name in methods}
    without = removals(attribution, scores)
    if bank is not None and without:
        trained, more = bank.train("retraining without what scores single out", list(without.values()))
        files, models = [*files, *trained], models | more
    with attribution.tasks(progress) as run_calls:
        losses = retrained_losses(run_calls, attribution.passes, models)
    if not (has_base := len(models) > len(removed)):  # a bank without a model of everything: ranks need none
        losses = np.concatenate([np.zeros_like(losses[:1]), losses])
    losses = losses.reshape(-1, num_seeds, losses.shape[1])  # [retraining, seed, query]
    changes, groups = losses[1:] - losses[0], attribution.queries.groups
    of_subsets, others = changes[: len(removed)], changes[len(removed) :].mean(axis=1)
    of_others = dict(zip(without, others, strict=True))
    found = {}
    for name, table in scores.items():
        predicted = removed_sums(of_samples(table), removed)
        files += write_method(run.path / FOLDER / name, attribution, table, -of_subsets.mean(axis=1), predicted)
        score = linear_datamodeling_score(predicted, -of_subsets.mean(axis=1), groups)
        found[name] = {"lds": entry(score), **loss_differences(name, of_others, groups)}
        progress.say(f"{STAGE}: LDS of {name} {score.value:+.3f} [{score.interval[0]:+.3f}, {score.interval[1]:+.3f}]")
    summary = describe(attribution, removed, of_subsets) | {"methods": found}
    summary |= {} if has_base else {"mean_change": None}
    write_json(run.path / RESULT, summary)
    run.publish(run.path / FOLDER)
    return [*files, run.path / RESULT]


def bank_models(bank: Path, num_subsets: int) -> dict[str, str]:
    """Folders of the models of a bank, the one trained on everything first, if it is there, and hashes of weights.

    Raises:
        PatterningError: one is missing.
    """
    found = {}
    for name in (BASE, *map(subset_name, range(num_subsets))):
        folder = bank / "retrained" / name
        weights = sorted(folder.glob("*.safetensors"))
        if not weights and name == BASE:
            continue
        if not weights:
            raise PatterningError(f"{folder}: no *.safetensors there; expected a model for every row of subsets.json")
        found[str(folder.absolute())] = "".join(file_sha256(file) for file in weights)
    return found


def removals(attribution: Attribution, scores: Scores) -> dict[tuple[Kind, str, int], Removal]:
    """(kind, method, query) -> what QLD removes: the samples, or single losses, that help a query most by a method."""
    settings, found = attribution.settings, dict[tuple[Kind, str, int], Removal]()
    for method, table in scores.items():
        for query, row in enumerate(of_samples(table) if settings.removed_share is not None else ()):
            assert settings.removed_share is not None
            ids = strongest(row, settings.removed_share)
            found["qld", method, query] = Removal(f"qld-{method}-{query}", ids)
        if attribution.counted is None or settings.removed_token_share is None or table.ndim == 2:
            continue
        sample, position = np.nonzero(attribution.counted)
        for query, row in enumerate(table):
            ids = strongest(row[sample, position], settings.removed_token_share)
            removal = Removal(f"token-qld-{method}-{query}", sample[ids], position[ids] + 1)
            found["token_qld", method, query] = removal
    return found


def loss_differences(
    method: str, changes: dict[tuple[Kind, str, int], np.ndarray], groups: np.ndarray
) -> dict[str, Any]:
    """QLD of a method, and what random removals of as many come to, of each kind that was measured.

    Args:
        method: name of it.
        changes: (kind, method, query) -> change of the loss of every query [query], nats.
        groups: of queries [query].
    """
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for kind, name, _ in changes if name == method):
        of_kind = {(name, query): change for (key, name, query), change in changes.items() if key == kind}
        own = np.array([of_kind[method, query][query] for query in range(len(groups))])
        control = np.mean([of_kind[RANDOM, query] for query in range(len(groups))], axis=0)
        over_random = entry(mean_over_queries(own - control, groups))
        found[kind] = entry(mean_over_queries(own, groups)) | {"random": control.mean(), "over_random": over_random}
    return found


def describe(attribution: Attribution, removed: list[np.ndarray], changes: np.ndarray) -> dict[str, Any]:
    """What was measured on: sizes, lengths, and how well halves of the seeds agree.

    Args:
        attribution: queries and settings.
        removed: samples that each subset leaves out.
        changes: of losses [subset, seed, query], nats.
    """
    settings, training = attribution.settings, attribution.config.training
    found: dict[str, Any] = {
        "start": attribution.start,
        "component": settings.component,
        "num_samples": attribution.num_samples,
        "num_queries": changes.shape[2],
        "num_subsets": len(removed),
        "num_removed": [min(map(len, removed)), max(map(len, removed))],
        "removed_share": settings.removed_share,
        "removed_token_share": settings.removed_token_share,
        "bank": settings.bank,
        "mean_change": changes.mean(),
        "agreement": None,
        "ceiling": None,
    }
    if settings.bank is None and training is not None and settings.num_steps is not None:
        passes = settings.num_steps * training.batch_size / attribution.num_samples
        found |= {"seeds": settings.seeds, "num_steps": settings.num_steps, "passes": passes}
    if changes.shape[1] > 1:
        first, second = (changes[:, half::2].mean(axis=1) for half in range(2))
        score = linear_datamodeling_score(first, second, attribution.queries.groups)
        found |= {"agreement": entry(score), "ceiling": ceiling(score.value)}
    return found


def write_method(
    folder: Path, attribution: Attribution, scores: np.ndarray, measured: np.ndarray, predicted: np.ndarray
) -> list[Path]:
    """Scores and what they predicted, in bergson's formats; returns the files."""
    offsets = None
    if scores.ndim == 3:
        offsets = np.arange(scores.shape[1] + 1) * scores.shape[2]
    files = write_scores(folder / "scores", scores.reshape(len(scores), -1), offsets)
    return [*files, write_validation(folder / "validation.csv", measured, predicted)]


def entry(score: Score) -> dict[str, Any]:
    """A score, for summary.json."""
    covers = ["subsets", "queries"] if score.over_subsets else ["queries"]
    found = {"value": score.value, "interval": list(score.interval), "covers": covers, "per_query": score.per_query}
    return found | ({"interval_over_subsets": list(score.over_subsets)} if score.over_subsets else {})
