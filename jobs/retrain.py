"""Stage `retrain`: the arms on weighted data.

ray job submit --working-dir . -- python jobs/retrain.py --config CONFIG --run-dir DIR
"""

from _stage import main

if __name__ == "__main__":
    main("retrain")
