"""`patterning doctor`: is this machine, and the cluster it joins, fit for a run? One finding a check."""

from patterning_dist.runtime.doctor.doctor import print_findings, run_doctor
from patterning_dist.runtime.doctor.machine import Finding

__all__ = ["Finding", "print_findings", "run_doctor"]
