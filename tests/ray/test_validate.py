"""Attribution is measured on retrainings: what foretells them scores high, random scores score nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_run import copy_run, finish_inputs, quiet, tiny_config

from patterning_dist.config import load_config
from patterning_dist.driver import run_stages
from patterning_dist.stages.validate import RESULT, validate

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow, pytest.mark.timeout(600)]


def test_tiny(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path)
    settings = yaml.safe_load((run.path / "config.yaml").read_text())
    settings |= {"solve": None, "retrain": None}
    settings["validation"] = {
        "methods": ["gradient", "influence", "susceptibility", "bm25"],
        "num_queries": 5, "num_subsets": 6, "num_steps": 3, "seeds": [0, 1], "engine": "stacked", "num_draws": 4,
        "removed_share": 0.05, "removed_token_share": 0.05,
    }
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = tiny_config(run.path)
    with run.locked() as locked:
        validate(config, locked, quiet())
    print(json.dumps(json.loads((run.path / RESULT).read_text()), indent=1))
