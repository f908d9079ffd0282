"""The stages of the parentheses experiment; each reads and writes files of the run directory."""

from patterning_dist.experiments.two_rules.stages.references import prepare, train
from patterning_dist.experiments.two_rules.stages.report import report
from patterning_dist.experiments.two_rules.stages.retrain import retrain
from patterning_dist.experiments.two_rules.stages.sample import sample
from patterning_dist.experiments.two_rules.stages.solve import solve

__all__ = ["prepare", "report", "retrain", "sample", "solve", "train"]
