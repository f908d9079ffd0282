"""The Grafana dashboard draws metrics that exist, and all of them; Prometheus reads where Ray says its nodes are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from exported_metrics import exported_names
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from patterning_dist.runtime.metrics import METRICS

CLUSTER = Path(__file__).parents[2] / "cluster"
DASHBOARD = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
# Labels that Prometheus and Ray add to the tags.
ADDED = {"le", "job", "instance", "WorkerId", "NodeAddress", "SessionName", "Component", "Version"}


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """All selectors of series under a node of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (child := getattr(node, name, None)) is not None:
            yield from selectors(child)
    for argument in getattr(node, "args", ()):
        yield from selectors(argument)


def parsed(expression: str) -> Any:
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_an_expression_reads_series_and_tags_that_are_exported(title: str, expression: str) -> None:
    exported = exported_names()
    found = list(selectors(parsed(expression)))
    assert found
    for selector in found:
        assert selector.name in exported, f"{title}: {selector.name}"
        tags = {matcher.name for matcher in selector.matchers.matchers}
        assert "run" in tags <= set(exported[selector.name])
        if isinstance(modifier := getattr(parsed(expression), "modifier", None), promql_parser.AggModifier):
            assert set(modifier.labels) <= {*exported[selector.name], "le"}


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_counters_are_rated_and_buckets_are_summed_before_quantiles(title: str, expression: str) -> None:
    if "_bucket" in expression:
        assert expression.startswith("histogram_quantile(") and "sum by (le," in expression
    if "_total" in expression:
        assert "rate(" in expression or title == "Restarts and exclusions"


def test_every_metric_is_drawn() -> None:
    drawn = {selector.name for _, expression in EXPRESSIONS for selector in selectors(parsed(expression))}
    for name, definition in METRICS.items():
        suffix = {"gauge": "", "counter": "_total", "histogram": "_bucket"}[definition.kind]
        assert f"ray_{name}{suffix}" in drawn


def test_the_legends_name_tags_of_their_series() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            tags = {tag for s in selectors(parsed(target["expr"])) for tag in exported_names()[s.name]}
            named = {part.split("}}")[0] for part in target["legendFormat"].split("{{")[1:]}
            assert named <= tags, panel["title"]


def test_panels_have_units_places_and_ids_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    cells: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["description"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells
        cells |= own
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_the_data_source_is_chosen_in_grafana() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    sources = [x["datasource"] for p in PANELS for x in (p, *p["targets"])]
    sources += [variables[name]["datasource"] for name in ("run", "subject")]
    assert all(source == chosen for source in sources)
    for name in ("run", "subject"):
        function, _, rest = variables[name]["query"]["query"].partition("(")
        metric, _, label = rest.removesuffix(")").rpartition(", ")
        (selector,) = selectors(parsed(metric))
        assert function == "label_values" and label == name and name in exported_names()[selector.name]


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    text = (CLUSTER / "prometheus.yaml").read_text()
    config = yaml.safe_load(text)
    assert set(config) == {"global", "scrape_configs"}
    assert set(config["global"]) == {"scrape_interval", "evaluation_interval"}
    (job,) = config["scrape_configs"]
    assert set(job) == {"job_name", "file_sd_configs"}
    (discovery,) = job["file_sd_configs"]
    assert set(discovery) == {"files", "refresh_interval"}
    assert [Path(file).name for file in discovery["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]
    assert "--web.listen-address=127.0.0.1:9090" in text
