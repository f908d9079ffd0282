"""Stage `solve`: the sample weights.

ray job submit --working-dir . -- python jobs/solve.py --config CONFIG --run-dir DIR
"""

from _stage import main

if __name__ == "__main__":
    main("solve")
