"""Faults on one cluster: a package, so that its fixtures live until the last of these tests is over."""
