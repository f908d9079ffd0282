"""All subjects as one xarray ``DataTree`` in a zarr store, which ArviZ and xarray open.

    /<subject>                                 attributes: settings of the chains, units, sign
    /<subject>/posterior        (chain, draw): the loss and every observable, deviations from w*
    /<subject>/susceptibility   (observable, sample): chi, standard_error; (sample): rhat, center_loss

The subtree of a subject follows ArviZ's conventions, so ``arviz.summary(tree["final/everything"])`` works on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from patterning_dist.measure.results import SubjectResponse
from patterning_dist.storage.files import explained, plain


def response_tree(
    responses: Sequence[tuple[SubjectResponse, Mapping[str, Any]]],
    index: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
) -> xr.DataTree:
    """The tree of all subjects.

    Args:
        responses: of every subject, with the attributes of its node.
        index: of the probe's single losses: sequence_id, position and so on [sample].
        attributes: of the root.
    """
    groups = {"/": xr.Dataset(attrs=_plain(attributes))}
    for response, settings in responses:
        groups[f"/{response.name}"] = xr.Dataset(attrs=_plain(settings))
        groups[f"/{response.name}/posterior"] = _posterior(response)
        groups[f"/{response.name}/susceptibility"] = _susceptibility(response, index)
    return xr.DataTree.from_dict(groups)


def write_tree(tree: xr.DataTree, store: Path) -> None:
    """Write the tree over whatever is there. Format 2 of zarr, since text has no place yet in that of 3.

    Raises:
        PatterningError: the disk is full or not writable.
    """
    with explained(store):
        tree.to_zarr(store, mode="w", zarr_format=2, consolidated=True)


def _posterior(response: SubjectResponse) -> xr.Dataset:
    return xr.Dataset(
        {name: (("chain", "draw"), values) for name, values in response.traces.items()},
        coords={"chain": list(response.chains), "draw": np.arange(response.traces["loss"].shape[1])},
        attrs={"values": "deviations from the checkpoint w*; losses in nats"},
    )


def _susceptibility(response: SubjectResponse, index: Mapping[str, np.ndarray]) -> xr.Dataset:
    by_row, by_sample = ("observable", "sample"), ("sample",)
    return xr.Dataset(
        {
            "chi": (by_row, response.chi),
            "standard_error": (by_row, response.standard_error),
            "rhat": (by_sample, response.rhat),
            "center_loss": (by_sample, response.center_losses),
        },
        coords={"observable": response.rows} | {name: (by_sample, column) for name, column in index.items()},
    )


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes are JSON, and NetCDF, to which trees are often copied, knows numbers and text only."""
    return {
        name: value if isinstance(value, int | float | str) else json.dumps(plain(value))
        for name, value in attributes.items()
        if value is not None
    }
