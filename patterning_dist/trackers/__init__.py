"""Adapters that send what a run's files say to an experiment tracker; ``follow.py`` is the one way to them."""
