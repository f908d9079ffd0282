"""One module a stage of a run: each reads files of the run directory and writes others."""
