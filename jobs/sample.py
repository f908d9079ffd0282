"""Stage `sample`: the posterior chains.

ray job submit --working-dir . -- python jobs/sample.py --config CONFIG --run-dir DIR
"""

from _stage import main

if __name__ == "__main__":
    main("sample")
