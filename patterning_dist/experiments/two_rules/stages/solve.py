"""Stage ``solve``: responses at the references -> weights of the strings, for both rules and for every control."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.scores import mean_rows, shuffled_kinds, toward_first
from patterning_dist.experiments.two_rules.stages.online import online_scores
from patterning_dist.experiments.two_rules.stages.references import EQUAL_COUNT, NESTED, read_references
from patterning_dist.experiments.two_rules.stages.responses import predicted, read_responses, reliabilities
from patterning_dist.experiments.two_rules.stages.weighting import permuted, weights_along, write_weights
from patterning_dist.experiments.two_rules.strings import read_split
from patterning_dist.experiments.two_rules.task import COMPONENT
from patterning_dist.progress import Progress
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory

_SHUFFLES = 0x73687566  # stream of the run's seed


def solve(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Solve for the weights of every arm; returns the files written: weights/<arm>.parquet, solution.json and rounds/.

    ``online`` rounds train and sample on the way.
    """
    strings = read_split(run.path / "data", "train", config.task.max_length)
    references = [reference for reference in read_references(run.path / "baseline") if not reference.is_held_out]
    names = [f"{reference.rule}-{number}" for number, reference in enumerate(references)]
    responses = read_responses(config, run, references, names)
    classes, kinds, winsorise = strings.labels, responses.kinds, config.weights.winsorise
    expected = responses.expected_loss.mean(axis=1)
    rng = np.random.default_rng([config.seed, _SHUFFLES])

    score = toward_first(expected, kinds, classes, winsorise)
    contrast = toward_first(responses.loss, kinds, classes, winsorise)
    scores = {"nested": score, "equal_count": -score, "loss_nested": contrast, "loss_equal_count": -contrast}
    for number in range(config.arms.num_shuffles):
        scores[f"shuffled_{number}"] = toward_first(expected, shuffled_kinds(rng, kinds), classes, winsorise)
    online, rounds, written = online_scores(config, run, score, strings, progress)
    scores |= {f"online_{side}": online[side] for side in (NESTED, EQUAL_COUNT)}

    progress.start("solving for weights", None)
    relative = {arm: weights_along(config, along[None], [1.0], classes) for arm, along in scores.items()}
    # What is lowered is favoured. These rows are taken as they are, without a score of the strings in between.
    for quantity, chi in (("free_energy", responses.free_energy), ("llc", responses.llc)):
        rows = mean_rows(chi.mean(axis=1), kinds)
        for rule, target in ((NESTED, [-1.0, 1.0]), (EQUAL_COUNT, [1.0, -1.0])):
            relative[f"{quantity}_{rule}"] = weights_along(config, rows, target, classes)
    relative["permuted"] = permuted(config.seed, relative["nested"], classes)
    written += [
        write_weights(run.path / "weights" / f"{arm}.parquet", strings, values, scores.get(arm))
        for arm, values in relative.items()
    ]
    n_beta = config.sampling.resolve(COMPONENT).inverse_temperature
    summary = {
        "reliability": reliabilities(responses, classes),
        "rounds": rounds,
        "arms": {
            arm: {
                "effective_sample_share": float(values.sum() ** 2 / (len(values) * (values @ values))),
                "largest_weight": float(values.max()),
                "predicted": predicted(responses, values, n_beta),
            }
            for arm, values in relative.items()
        },
    }
    write_json(run.path / "weights" / "solution.json", summary)
    return [*written, run.path / "weights" / "solution.json"]
