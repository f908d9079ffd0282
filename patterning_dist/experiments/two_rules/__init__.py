"""The parentheses experiment."""

# The root config imports this experiment's sections while it is loaded itself: whichever module a worker imports first,
# it has to come first.
import patterning_dist.config  # noqa: F401
