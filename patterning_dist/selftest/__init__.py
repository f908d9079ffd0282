"""`patterning selftest`: truths that others wrote, found again on this machine. One line a truth, no Ray."""

from patterning_dist.selftest.runner import print_checks

__all__ = ["print_checks"]
