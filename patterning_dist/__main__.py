"""`python -m patterning_dist`: the `patterning` command, where its script is not on the path."""

from patterning_dist.cli import app_main

if __name__ == "__main__":
    app_main()
