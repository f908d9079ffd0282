"""Every stage that is not done yet.

ray job submit --working-dir . -- python jobs/pattern.py --config CONFIG --run-dir DIR
"""

from _stage import main

if __name__ == "__main__":
    main("run")
