"""A scorer: the weights of an arm as a function of what the model makes of a sample, for samples of another corpus.

    rho_i ~ c + x_i . b ,     x_i = (l_i, l_i^2, features of the model at the checkpoint)

by ridge regression on the training samples. A fifth of their documents stays apart and says how well the function
knows the weights; another fifth has chosen the penalty.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from patterning_dist.config import Config, LabelledConfig, PairsConfig, TextConfig, TokensConfig
from patterning_dist.data.corpus import Source, read_documents
from patterning_dist.data.export import Weighted
from patterning_dist.data.prepare import cut_text
from patterning_dist.data.sampler import permutation
from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.tokenizer import SEPARATOR, text_tokenizer
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.data.weights import SampleWeights, refuse_swaps
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.ridge import Products, Ridge, choose_ridge, grouped_correlation
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.export import Format, check_target, effective_share, weights_of, write_weighted
from patterning_dist.storage.files import file_sha256, write_json, write_npz
from patterning_dist.storage.run import RunDirectory, refuse_changed
from patterning_dist.tasks.open import open_task
from patterning_dist.tasks.task import Task

_STREAM = 0x73636F7265  # of the documents that are fitted, and of those that are not
_PENALTIES = np.logspace(-6, 1, 15)
_BATCH = 16
_LEAST = 20  # groups, so that a fifth of them is several


class Rows(NamedTuple):
    """What is weighed: entries of some samples, or samples.

    Attributes:
        features: [row, feature].
        sample: number of the sample of every row [row].
        mask: entries that count of the samples from ``first`` on [sample, position]; None where a row is a sample.
        first: see there.
    """

    features: np.ndarray
    sample: np.ndarray
    mask: np.ndarray | None = None
    first: int = 0

    def targets(self, weights: np.ndarray) -> np.ndarray:
        """Their weights [row], of all weights [sample] or [sample, position]."""
        if self.mask is not None:
            return weights[self.first : self.first + len(self.mask)][self.mask]
        mine = weights[self.sample]
        return mine if mine.ndim == 1 else mine.max(axis=1)  # one weight a sample, 0 where nothing counts


@dataclass(frozen=True)
class Scorer:
    """A ridge over features, and what is known of it.

    Attributes:
        ridge: weights from features.
        by_sample: weights are of whole samples, and features their means.
        share: effective sample share of the weights that it was fitted to.
        weight_max: largest of them.
        report: r with its interval, and what both are of.
    """

    ridge: Ridge
    by_sample: bool
    share: float
    weight_max: float
    report: dict[str, Any]


def score(
    config: Config,
    run: RunDirectory,
    name: str,
    data: Path,
    folder: Path,
    kind: Format,
    copies: float | None,
    seed: int,
) -> None:
    """Weigh a new corpus by the weights of an arm, and write it as ``export`` does.

    The scorer is kept in scorers/ of the run, and fitted again where model, data or weights changed.

    Args:
        config: of the run.
        run: with its data and checkpoints.
        name: of an arm, or of a table in weights/.
        data: text, or a table like the run's training data.
        folder: to be made.
        kind: of the file of samples.
        copies: mean number of copies of a sample; None: weights.
        seed: of the numbers of copies.

    Raises:
        PatterningError: no such weights, samples without features, a corpus that cannot be read, or what
            ``check_target`` refuses.
    """
    check_target(folder, kind, copies)
    if not data.exists():
        raise PatterningError(f"{data}: is not there; give text files, a folder of them or a table")
    checkpoint = (config.solve and config.solve.checkpoint) or config.checkpoints[0]
    run.location.fetch("data", "weights", "retrain", checkpoint)
    table, arm = weights_of(config, run.path, name)
    refuse_changed(run.location, run.manifest, "data", checkpoint, table.relative_to(run.path).as_posix())
    task = open_task(config, run.path, "cpu")
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        samples, corpus = _read(config, run.path, data, Path(scratch))
        model = task.load(checkpoint, Ranks())
        scorer = _fitted(run.path / "scorers" / name, task, model, checkpoint, table, arm.strength, progress)
        progress.say(_said(name, scorer.report))
        weights = _apply(scorer, task, model, samples, progress)
        weighted = Weighted.of(samples, weights, corpus)
        said = {"run": str(run.location), "weights": name, "data": str(data), "scorer": scorer.report}
        write_weighted(folder, weighted, kind, copies, seed, said)


def _said(name: str, report: dict[str, Any]) -> str:
    low, high = report["interval"]
    return (
        f"scorer of {name}: on {report['num_held_out']} {report['covers']} that it was not fitted to its r with the "
        f"weights is {report['r']:.2f} [{low:.2f}, {high:.2f}]"
    )


def _read(
    config: Config, directory: Path, data: Path, scratch: Path
) -> tuple[TokenDataset | SequenceTable, Path | None]:
    """New samples like those of the run, and the folder of their sources where text was cut."""
    own = config.data
    if isinstance(own, TextConfig):
        tokenizer = Tokenizer.from_file(str(directory / "data/tokenizer.json"))
        own_separator = int(tokenizer.token_to_id(SEPARATOR) or 0)
        separator = own_separator if own.tokenizer is None else text_tokenizer(own.tokenizer)[1]
        cut_text(read_documents([Source(data)]), scratch, tokenizer, separator, own.context_length)
        return TokenDataset(scratch / "train.parquet"), scratch
    if not isinstance(own, TokensConfig | PairsConfig | LabelledConfig):
        raise PatterningError(f"{config.name}: its samples come from a function, which a file cannot stand in for")
    there = own.model_copy(update={"train": str(data), "held_out": {}})
    samples: Any = open_task(config.model_copy(update={"data": there}), directory, "cpu").train
    return samples, None


def _fitted(
    folder: Path, task: Task, model: nn.Module, checkpoint: str, table: Path, strength: float, progress: Progress
) -> Scorer:
    """The scorer in a folder, or a new one."""
    inputs = json.loads(json.dumps([task.fingerprint(checkpoint), file_sha256(table), strength, _BATCH]))
    file = folder / "scorer.json"
    if file.exists() and (stored := json.loads(file.read_text()))["inputs"] == inputs:
        with np.load(folder / "scorer.npz") as arrays:
            ridge = Ridge(arrays["coefficients"], float(arrays["intercept"]), stored["report"]["penalty"])
        return Scorer(ridge, stored["by_sample"], stored["share"], stored["weight_max"], stored["report"])
    refuse_swaps(table)
    by_sample = SampleWeights.load(table, task.key).position is None
    scorer = _fit(task, model, task.read_weights(table, strength), by_sample, progress)
    write_npz(
        folder / "scorer.npz",
        {"coefficients": scorer.ridge.coefficients, "intercept": np.array(scorer.ridge.intercept)},
    )
    kept = {"by_sample": by_sample, "share": scorer.share, "weight_max": scorer.weight_max}
    write_json(file, {"inputs": inputs, **kept, "report": scorer.report})
    return scorer


def _fit(task: Task, model: nn.Module, weights: np.ndarray, by_sample: bool, progress: Progress) -> Scorer:
    ids = np.arange(len(task.train))
    documents = task.index(task.train, ids).get("document", ids)
    groups, group = np.unique(documents, return_inverse=True)
    if len(groups) < _LEAST:
        groups, group = ids, ids
    if len(groups) < _LEAST:
        raise PatterningError(f"a scorer needs {_LEAST} training samples or more, and there are {len(groups)}")
    fold = (permutation(0, _STREAM, len(groups)) % 5)[group]  # 0: held out, 1: chooses the penalty
    parts: list[Products] = []
    held_out: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen: list[np.ndarray] = []
    progress.start("the scorer: features of the training samples", len(ids))
    for rows in _rows(task, model, task.train, by_sample):
        target = rows.targets(weights)
        seen.append(target)
        parts = parts or [Products.empty(rows.features.shape[1]) for _ in range(2)]
        of_row = fold[rows.sample]
        for part, here in zip(parts, (of_row > 1, of_row == 1), strict=True):
            part.update(rows.features[here], target[here])
        apart = of_row == 0
        held_out.append((rows.features[apart].astype(np.float32), target[apart], group[rows.sample[apart]]))
        progress.update(int(rows.sample[-1]) + 1)
    of_all = np.concatenate(seen)
    if of_all.min() == of_all.max():
        raise PatterningError("all of these weights are equal: there is nothing to learn from them")
    ridge = choose_ridge(parts[0], parts[1], _PENALTIES)
    predicted = np.concatenate([ridge.predict(features) for features, _, _ in held_out])
    where = np.concatenate([which for _, _, which in held_out])
    r, interval = grouped_correlation(predicted, np.concatenate([target for _, target, _ in held_out]), where)
    report = {
        "r": r,
        "interval": interval,
        "covers": "documents" if len(groups) < len(ids) else "samples",
        "num_held_out": len(np.unique(where)),
        "num_features": len(ridge.coefficients),
        "penalty": ridge.penalty,
    }
    return Scorer(ridge, by_sample, effective_share(of_all, len(of_all)), float(of_all.max()), report)


def _rows(task: Task, model: nn.Module, samples: Any, by_sample: bool) -> Iterator[Rows]:
    """All that is weighed of some samples, a batch at a time."""
    for start in range(0, len(samples), _BATCH):
        ids = np.arange(start, min(start + _BATCH, len(samples)))
        batch = samples[torch.from_numpy(ids)]
        with torch.no_grad():
            losses = task.losses(model, batch).float()
            found = torch.cat([losses[..., None], losses[..., None] ** 2, task.features(model, batch)], dim=-1)
        features = found.cpu().double().numpy()
        if losses.dim() == 1:
            yield Rows(features, ids)
            continue
        counted = task.counted(samples, ids)
        mask = np.ones(losses.shape, bool) if counted is None else counted
        if by_sample:
            yield Rows((features * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True), ids)
        else:
            yield Rows(features[mask], np.repeat(ids, mask.sum(axis=1)), mask, start)


def _apply(scorer: Scorer, task: Task, model: nn.Module, samples: Any, progress: Progress) -> np.ndarray:
    """Weights of new samples [sample] or [sample, position], at the effective share of those that were learnt."""
    progress.start("features of the new samples", len(samples))
    scores = []
    for rows in _rows(task, model, samples, scorer.by_sample):
        scores.append(scorer.ridge.predict(rows.features))
        progress.update(int(rows.sample[-1]) + 1)
    score = np.concatenate(scores)
    weights = solve_for_effective_sample_share(
        (score - score.mean())[None], [1.0], scorer.share, inverse_temperature=1.0, weight_max=scorer.weight_max
    ).weights.astype(np.float32)
    if task.num_positions is None:
        return weights
    counted = task.counted(samples, np.arange(len(samples)))
    mask = np.ones((len(samples), samples.context_length - 1), bool) if counted is None else counted
    if scorer.by_sample:
        return weights[:, None] * mask
    found = np.zeros(mask.shape, np.float32)
    found[mask] = weights
    return found
