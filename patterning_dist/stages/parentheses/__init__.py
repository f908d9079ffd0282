"""The stages of the parentheses experiment; each reads and writes files of the run directory."""

from patterning_dist.stages.parentheses.references import prepare, train
from patterning_dist.stages.parentheses.report import report
from patterning_dist.stages.parentheses.retrain import retrain
from patterning_dist.stages.parentheses.sample import sample
from patterning_dist.stages.parentheses.solve import solve

__all__ = ["prepare", "report", "retrain", "sample", "solve", "train"]
