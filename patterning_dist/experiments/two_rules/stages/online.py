"""Online rounds: fresh networks under the weights so far, chains around them, and a direction that adds to the last.

The first direction is that of networks on plain strings. Under its weights networks of other kinds come out, among
which it says little: the rounds ask what separates *those* that follow either rule.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.scores import standardised, toward_first
from patterning_dist.experiments.two_rules.stages.networks import ROUNDS, network_seeds, train_networks, write_networks
from patterning_dist.experiments.two_rules.stages.references import EQUAL_COUNT, NESTED, Reference
from patterning_dist.experiments.two_rules.stages.responses import read_responses, reliabilities
from patterning_dist.experiments.two_rules.stages.sample import sample_subjects, subject
from patterning_dist.experiments.two_rules.stages.weighting import two_phases, weights_along
from patterning_dist.experiments.two_rules.strings import BracketStrings
from patterning_dist.progress import Progress
from patterning_dist.response.moments import Floats
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory

# Numbers of subjects: those of the rounds begin here, those of a round and side are this far apart.
_FIRST_SUBJECT, _SUBJECTS = 1_000_000, 100_000


def online_scores(
    config: ParenthesesConfig, run: RunDirectory, score: Floats, strings: BracketStrings, progress: Progress
) -> tuple[dict[str, Floats], dict[str, Any], list[Path]]:
    """Scores toward either rule after the rounds, what is to be said of each round, and the files written.

    Args:
        config: of the run.
        run: its directory; rounds/ is written.
        score: toward NESTED, of the networks on plain strings [sample].
        strings: training strings.
        progress: shows the networks and the chains.

    Raises:
        PatterningError: too few networks of a round are accurate.
    """
    scores, written = {NESTED: score, EQUAL_COUNT: -score}, list[Path]()
    described, diagnostics = dict[str, Any](), dict[str, Any]()
    for number in range(1, config.online.num_rounds + 1):
        names = {side: f"toward_{side}_{number}" for side in scores}
        references, files = _train_round(
            config, run, number, {names[side]: toward for side, toward in scores.items()}, strings, progress
        )
        subjects = {
            _subject_name(name, reference): subject(
                config,
                _FIRST_SUBJECT + (2 * number + place) * _SUBJECTS + reference.index,
                f"rounds/{name}",
                reference.index,
            )
            for place, name in enumerate(names.values())
            for reference in references[name]
        }
        measured = sample_subjects(config, run, "solve", subjects, progress)
        diagnostics |= measured.diagnostics
        written += [*files, *measured.files]
        for side, name in names.items():
            subject_names = [_subject_name(name, reference) for reference in references[name]]
            responses = read_responses(config, run, references[name], subject_names)
            kinds = responses.kinds if side == NESTED else 1 - responses.kinds
            toward = toward_first(responses.expected_loss.mean(axis=1), kinds, strings.labels, config.weights.winsorise)
            described[name] = {
                "reliability": reliabilities(responses, strings.labels),
                "correlation_with_score": float(np.corrcoef(toward, scores[side])[0, 1]),
            }
            scores[side] = standardised(scores[side] + toward, strings.labels)
    write_json(run.path / "response" / "rounds.json", {"subjects": diagnostics})
    return scores, described, [*written, run.path / "response" / "rounds.json"]


def _train_round(
    config: ParenthesesConfig,
    run: RunDirectory,
    number: int,
    scores: dict[str, Floats],
    strings: BracketStrings,
    progress: Progress,
) -> tuple[dict[str, list[Reference]], list[Path]]:
    """Fresh networks under the weights along each score: those to sample around, by name, and the files written."""
    seeds = network_seeds(config, ROUNDS + number * config.online.num_seeds, config.online.num_seeds)
    arms = {}
    for name, toward in scores.items():
        weights = strings.class_weights * weights_along(config, toward[None], [1.0], strings.labels)
        arms[name] = (seeds, two_phases(config, strings, weights))
    references, written = {}, []
    for name, networks in train_networks(config, run, arms, "rounds", progress).items():
        folder = run.path / "rounds" / name
        references[name] = _ends(config, name, networks.behaviour)
        written += write_networks(folder, seeds, networks)
        write_json(folder / "references.json", [asdict(entry) for entry in references[name]])
        written.append(folder / "references.json")
    run.publish(*written)  # workers elsewhere read them
    return references, written


def _subject_name(name: str, reference: Reference) -> str:
    return f"{name}-{reference.rule}-{reference.index}"


def _ends(config: ParenthesesConfig, name: str, behaviour: dict[str, np.ndarray]) -> list[Reference]:
    """The networks that reject most, and those that reject least, of those that are accurate enough."""
    accurate = np.flatnonzero(behaviour["train"] >= config.references.train_accuracy)
    wanted = config.online.per_rule
    if len(accurate) < 2 * wanted:
        raise PatterningError(
            f"round {name}: {len(accurate)} of {len(behaviour['train'])} networks have a training accuracy of at least "
            f"{config.references.train_accuracy:g}, twice online.per_rule = {wanted} are wanted; raise "
            "online.num_seeds or weights.effective_share, or lower arms.reweighted_share"
        )
    order = accurate[np.argsort(behaviour["rejected"][accurate], kind="stable")]
    return [
        Reference(rule, int(index), float(behaviour["rejected"][index]))
        for rule, found in ((NESTED, order[::-1][:wanted]), (EQUAL_COUNT, order[:wanted]))
        for index in found
    ]
