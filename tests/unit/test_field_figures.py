"""Figures show the numbers of the tables, nothing more: axes are those of scikit-learn, noise is called noise."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA

from patterning_dist import open_run
from patterning_dist.errors import PatterningError
from patterning_dist.opened import OpenedRun
from patterning_dist.report import build_report
from patterning_dist.report.colours import Colours
from patterning_dist.report.drawing import Drawing
from patterning_dist.report.probe import more_than_chance
from patterning_dist.report.token_map import _labels
from patterning_dist.report.traces import Walk, rank_shares, ranks, traces
from patterning_dist.report.words import Metrics

sys.path.append(str(Path(__file__).parent))  # whatever the import mode of the tests
measured_run = importlib.import_module("measured_run")
_posterior = importlib.import_module("report_fixture_posterior")
write_json, write_table = _posterior.write_json, _posterior.write_table
COMPONENTS, OBSERVABLES = measured_run.COMPONENTS, measured_run.OBSERVABLES
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chi is noise at the first checkpoint and grows after it."""
    signals = {"step-0": 0.0, "step-100": 0.6, "final": 1.0}
    return measured_run.write_measured(tmp_path_factory.mktemp("runs") / "trained", signals)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_run.write_measured(tmp_path_factory.mktemp("runs") / "noise", {"baseline": 0.0})


@pytest.fixture
def run(trained: Path) -> OpenedRun:
    return open_run(trained)


def chi_of(run: Path, subject: str) -> pd.DataFrame:
    folder, _, component = subject.rpartition("/")
    return pq.read_table(run / "response" / folder / f"susceptibility-{component}.parquet").to_pandas()


def vectors(run: Path, checkpoint: str, scaled_by: str) -> np.ndarray:
    """Chi in standard errors of a checkpoint, a column a row of chi [entry, row]."""
    columns = []
    for component in COMPONENTS:
        for observable in OBSERVABLES:
            chi = chi_of(run, f"{checkpoint}/{component}")[f"chi_{observable}"].to_numpy(float)
            error = chi_of(run, f"{scaled_by}/{component}")[f"se_{observable}"].to_numpy(float)
            columns.append(chi / np.sqrt(np.mean(error**2)))
    return np.stack(columns, axis=1)


def written(drawing: Drawing, folder: Path) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(drawing.save(folder / "numbers.csv").read_text()), keep_default_na=False)


def panels(drawing: Drawing, folder: Path) -> list[ElementTree.Element]:
    return ElementTree.parse(drawing.save(folder / "drawing.svg")).getroot().findall(f"{SVG}svg")


def assert_drawn(numbers: np.ndarray, places: np.ndarray) -> None:
    """Places in a drawing, in tenths of a unit, are numbers on a linear axis."""
    assert len(numbers) == len(places) > 2
    slope, start = np.polyfit(numbers, places, 1)
    np.testing.assert_allclose(start + slope * numbers, places, atol=0.1)


def test_axes_are_the_principal_components_of_scikit_learn_with_the_largest_loading_positive(
    trained: Path, run: OpenedRun
) -> None:
    table = run.plot.token_map(points=600).table
    assert table["checkpoint"].unique().tolist() == ["step-100", "final"]
    entries = table[table.checkpoint == "final"]["entry"].to_numpy()
    assert len(set(entries)) == 300
    reference = PCA(2).fit(vectors(trained, "step-100", "step-100")[entries])
    axes = reference.components_.T
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    for checkpoint in ("step-100", "final"):  # on the axes, and in the errors, of the first that is no noise
        found = table[table.checkpoint == checkpoint][["axis_1", "axis_2"]].to_numpy()
        points = vectors(trained, checkpoint, "step-100")[entries]
        np.testing.assert_allclose(found, (points - points.mean(axis=0)) @ axes, atol=1e-4)
    share = f"axis 1: {100 * reference.explained_variance_ratio_[0]:.0f} % of the variance"
    assert share in run.plot.token_map(points=600)._repr_html_()


def test_the_map_says_what_is_noise_and_its_table_is_what_is_drawn(run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.token_map(colour="domain")
    table, (first, last, loadings) = written(drawing, tmp_path), panels(drawing, tmp_path)
    for panel, checkpoint in ((first, "step-100"), (last, "final")):
        dots, rows = panel.findall(f".//{SVG}circle"), table[table.checkpoint == checkpoint]
        assert_drawn(rows["axis_1"].to_numpy(), np.array([float(dot.attrib["cx"]) for dot in dots]))
        assert_drawn(rows["axis_2"].to_numpy(), np.array([float(dot.attrib["cy"]) for dot in dots]))
        styles = pd.Series([dot.attrib["class"] for dot in dots]).groupby(rows["domain"].to_numpy()).unique()
        assert sorted(len(found) for found in styles) == [1] * 4 and len({found[0] for found in styles}) == 4
        assert dots[5].find(f"{SVG}title").text.endswith(f"· {rows['domain'].iloc[5]}")
    assert "Not drawn, since χ is mostly noise there: step-0" in drawing._repr_html_()
    assert len(loadings.findall(f".//{SVG}rect")) == 2 * len(COMPONENTS) * len(OBSERVABLES)


def test_a_row_that_does_not_repeat_is_left_out_of_the_map_and_named(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    diagnostics = json.loads((copy / "response/diagnostics.json").read_text())
    diagnostics["subjects"]["step-100/everything"]["observables"]["component"]["reliability"] = 0.3
    (copy / "response/diagnostics.json").write_text(json.dumps(diagnostics))
    html = open_run(copy).plot.token_map()._repr_html_()
    assert "its χ in 5 rows" in html and "mostly noise: everything · component." in html


def test_points_of_the_map_tell_their_context(trained: Path, run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.token_map(colour="pattern")
    tips = [found.text for found in panels(drawing, tmp_path)[0].findall(f".//{SVG}circle/{SVG}title")]
    index, texts = chi_of(trained, "final/everything"), run.plot._probe().text
    entries = drawing.table["entry"].iloc[: len(tips)]
    for entry, tip in list(zip(entries, tips, strict=True))[:200:13]:
        row = index.iloc[entry]
        assert f"[{texts.visible(row['token'])}]" in tip and tip.endswith(f"· {row['pattern']}")


def test_noise_is_called_noise_and_not_drawn(noise: Path, tmp_path: Path) -> None:
    plot = open_run(noise).plot
    for drawing in (plot.token_map(), plot.heat_map(), plot.passages()):
        html = drawing._repr_html_()
        assert "noise" in html and "<svg" not in html and drawing.table.empty
        with pytest.raises(PatterningError, match=r"no drawing to save as \.svg"):
            drawing.save(tmp_path / "noise.svg")
    page = build_report(noise).read_text(encoding="utf-8")
    section = re.search(r'<section id="susceptibilities">(.*?)</section>', page, re.S)[1]
    assert "Map of tokens" in section and "of component, induction" not in section
    assert "of component and induction is mostly noise" in section and "dot point" not in section


def test_chance_gives_one_interval_in_twenty_and_hardly_more() -> None:
    assert not more_than_chance(0, 5) and not more_than_chance(5, 100) and not more_than_chance(10, 100)
    assert more_than_chance(20, 100) and more_than_chance(4, 4)
    rng = np.random.default_rng(0)
    assert sum(more_than_chance(int((rng.random(40) < 0.05).sum()), 40) for _ in range(1000)) <= 5


def test_an_axis_is_doubted_where_noise_that_all_rows_share_could_give_it() -> None:
    rng = np.random.default_rng(1)
    for shared in (0.0, 0.7, 1.0):  # of the noise of six rows, and nothing but noise
        values = np.sqrt(1 - shared) * rng.normal(size=(6, 400)) + np.sqrt(shared) * rng.normal(size=400)
        values -= values.mean(axis=1, keepdims=True)
        axes = np.linalg.eigh(np.cov(values))[1][:, ::-1][:, :2]
        errors = values.std(axis=1)
        assert all("noise alone" in label for label in _labels(axes.T @ values, values, 1.001 * errors))
        first, second = _labels(axes.T @ values, values, 0.3 * errors)  # the same values, known better
        assert ("noise alone" in first, "noise alone" in second) == (False, shared == 1.0)


def test_the_heat_map_shows_the_table_in_errors_and_no_colour_where_the_interval_has_zero(
    trained: Path, run: OpenedRun, tmp_path: Path
) -> None:
    drawing = run.plot.heat_map(observable="induction", kind="domain")
    table, stored = written(drawing, tmp_path), pq.read_table(trained / "response/groups.parquet").to_pandas()
    stored = stored[(stored.observable == "induction") & (stored.kind == "domain")]
    np.testing.assert_allclose(table["chi"], stored["chi"])
    np.testing.assert_allclose(table["standard_errors"], stored["chi"] / stored["standard_error"])
    for panel, checkpoint in zip(panels(drawing, tmp_path), ("step-0", "step-100", "final"), strict=True):
        rows = table[table.checkpoint == checkpoint]
        boxes = panel.findall(f".//{SVG}rect")
        for box, (_, row) in zip(boxes, rows.iterrows(), strict=True):
            side = "positive" if row["low"] > 0 else "negative" if row["high"] < 0 else "neutral"
            assert box.attrib["class"] == f"box {side}"
            assert box.find(f"{SVG}title").text.startswith(f"{row['component']}, {row['group']} ({row['num_entries']}")
    final = table[(table.checkpoint == "final") & (table.component == "everything")].set_index("group")["chi"]
    assert final["stories"] < 0 < final["python"]  # as the losses of the fixture follow the second observable


def test_bands_are_the_intervals_of_the_coefficients(trained: Path, run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.llc()
    table, (panel,) = written(drawing, tmp_path), panels(drawing, tmp_path)
    diagnostics = json.loads((trained / "response/diagnostics.json").read_text())["subjects"]
    for (_, row), (name, entry) in zip(table.iterrows(), diagnostics.items(), strict=True):
        assert name == f"{row['checkpoint']}/{row['component']}"
        assert [row["low"], row["high"]] == entry["llc"]["interval"] and row["value"] == entry["llc"]["value"]
    dots = [float(dot.attrib["cy"]) for dot in panel.findall(f".//{SVG}circle")]
    ordered = table.sort_values("component", key=lambda c: c.map(COMPONENTS.index), kind="stable")
    assert_drawn(ordered["value"].to_numpy(), np.array(dots))
    bands = [path.attrib["d"] for path in panel.findall(f".//{SVG}path") if "band" in path.attrib["class"]]
    ends = [[float(pair.split()[1]) for pair in band.strip("Mz").split("L")] for band in bands]
    by_component = [ordered[ordered.component == component] for component in COMPONENTS]
    expected = np.concatenate([np.concatenate([t["high"], t["low"][::-1]]) for t in by_component])
    assert_drawn(expected, np.concatenate(ends))


def test_a_coefficient_of_chains_that_have_not_met_is_hollow(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    diagnostics = json.loads((copy / "response/diagnostics.json").read_text())
    apart = diagnostics["subjects"]["final/everything"]
    apart["observables"]["loss"]["rhat"], apart["llc"] = 1.2, {"value": 90.0, "interval": [88.0, 92.0]}
    (copy / "response/diagnostics.json").write_text(json.dumps(diagnostics))
    html = open_run(copy).plot.llc()._repr_html_()
    hollow = re.findall(r'<circle class="dot group-\d hollow"[^>]*><title>([^<]*)<', html)
    assert [tip.partition(":")[0] for tip in hollow] == ["everything, final"]
    assert "The LLC of everything grows from 50 at step-0 to 90 at final" in html


def test_passages_have_colour_only_beyond_two_errors(run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.passages(observable="component", component="everything", checkpoint="final", count=3)
    table = written(drawing, tmp_path)
    assert table["sequence_id"].nunique() == 3
    pieces = re.findall(r'<span class="token( up| down)?" style="--s:([\d.]+)" title="([^"]*)"', drawing._repr_html_())
    told = [piece for piece in pieces if "χ" in piece[2]]
    beyond = table["chi"].abs() >= 2 * table["standard_error"]
    assert beyond.any() and not beyond.all() and (table["coloured"] == beyond).all()
    sides = np.where(~beyond, "", np.where(table["chi"] > 0, " up", " down"))
    assert [side for side, _, _ in told] == sides.tolist()
    assert max(float(shade) for _, shade, _ in told) <= 1 and {shade for side, shade, _ in told if not side} == {"0.00"}
    with pytest.raises(PatterningError, match=r"no row of observable nothing.*there are component, induction"):
        run.plot.passages(observable="nothing")


def test_traces_begin_after_the_burn_in(trained: Path, run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.traces("final/everything")
    table = written(drawing, tmp_path)
    stored = pq.read_table(trained / "sampling/final/everything/traces.parquet").to_pandas()
    for name in ("chain", "draw", "loss", *OBSERVABLES):
        np.testing.assert_allclose(table[name], stored[name])
    assert (table["step"] == measured_run.BURN_IN + table["draw"] * measured_run.STEPS).all()
    panel = panels(drawing, tmp_path)[0]
    (shaded,) = panel.findall(f".//{SVG}rect")
    curves = [path.attrib["d"] for path in panel.findall(f".//{SVG}path")]
    assert len(curves) == measured_run.NUM_CHAINS
    start = float(shaded.attrib["x"]) + float(shaded.attrib["width"])
    np.testing.assert_allclose([float(curve[1:].split()[0]) for curve in curves], start, atol=0.11)
    with pytest.raises(PatterningError, match="no subject 'nothing'; there are step-0/everything"):
        run.plot.traces("nothing")


def test_rank_plots_are_even_where_chains_agree_and_not_where_one_is_elsewhere(run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.ranks("final/everything")
    table = written(drawing, tmp_path)
    for panel, quantity in zip(panels(drawing, tmp_path), ("loss", *OBSERVABLES), strict=True):
        curves = [path.attrib["d"] for path in panel.findall(f".//{SVG}path")]
        places = [float(point.split()[1]) for curve in curves for point in curve[1:].split("L")[::2]]
        assert_drawn(table[table.quantity == quantity]["share"].to_numpy(), np.array(places))
    rng = np.random.default_rng(0)
    outside = []
    for _ in range(40):
        shares, half_width = rank_shares(rng.normal(size=(4, 200)))
        np.testing.assert_allclose(shares.mean(axis=1), 1)
        np.testing.assert_allclose(shares.mean(axis=0), 1)
        outside.append(np.mean(np.abs(shares - 1) > half_width))
    assert 0.02 < np.mean(outside) < 0.08
    apart = rng.normal(size=(4, 200)) + np.array([0, 0, 0, 2.0])[:, None]
    shares, half_width = rank_shares(apart)
    assert shares[3, -1] > 1 + half_width and shares[3, 0] < 1 - half_width
    assert rank_shares(np.ones((4, 200))) is None and rank_shares(apart[:1]) is None


def test_of_many_chains_some_are_drawn_and_that_is_said() -> None:
    rng = np.random.default_rng(0)
    found = {"loss": {chain: rng.normal(size=100) for chain in range(40)}}
    walk = Walk("many", found, burn_in=0, steps_between_draws=0)
    assert len(walk.shown) == 12 and walk.shown[0] == 0 and walk.shown[-1] == 39
    for drawing in (traces(walk, Metrics({})), ranks(walk)):
        assert drawing.table["chain"].unique().tolist() == walk.shown
        assert "12 of 40 chains are drawn" in drawing._repr_html_() and drawing._repr_html_().count("<path") == 12
    everyone = rank_shares(walk.whole("loss")[1])[0]  # ranks are among all chains
    np.testing.assert_allclose(ranks(walk).table["share"], everyone[walk.shown].ravel())


def test_samples_without_positions_have_a_map_by_label(tmp_path: Path) -> None:
    rng, labels = np.random.default_rng(0), np.repeat(["even", "odd"], 20)
    columns = {"sample_id": np.arange(40), "label": labels, "center_loss": np.ones(40), "rhat": np.ones(40)}
    for name in ("a", "b"):
        columns |= {
            f"chi_{name}": np.where(labels == "odd", 1.0, -1.0) + rng.normal(size=40),
            f"se_{name}": np.ones(40),
        }
    write_table(tmp_path / "response/susceptibility-everything.parquet/part-00000.parquet", columns)
    rows = {name: {"reliability": 0.8} for name in ("a", "b")}
    write_json(tmp_path / "response/diagnostics.json", {"subjects": {"everything": {"observables": rows}}})
    write_json(tmp_path / "manifest.json", {"stages": {}})
    drawing = open_run(tmp_path).plot.token_map()
    assert drawing.title == "Map of samples by susceptibility, coloured by label"
    assert drawing.table["sample_id"].tolist() == list(range(40))
    assert "<title>sample 3 · even</title>" in drawing._repr_html_()
    # Two rows of one component share their draws: noise of one standard error each could all be one axis.
    assert "axis 2" in drawing._repr_html_() and "which noise alone could give" in drawing._repr_html_()


def test_more_than_eight_groups_share_the_last_colour() -> None:
    names = np.repeat([f"g{number}" for number in range(10)], np.arange(20, 10, -1))
    colours = Colours({"domain": names}, "domain")
    assert [style for style, _ in colours.legend] == [*(f"group-{number}" for number in range(7)), "group-rest"]
    assert colours.legend[0][1] == "g0 (20)" and colours.legend[-1][1] == "3 others (36)"
    assert colours.style("g9") == "group-rest" and colours.style("g6") == "group-6"
    first = (names == "g0").astype(float)
    assert colours.share_between(first, np.arange(len(names))) == pytest.approx(1)
    with pytest.raises(PatterningError, match="'law' is no column of the probe; it has domain"):
        Colours({"domain": names}, "law")


def test_a_saved_figure_needs_nothing_else_and_touches_nothing_around_it(run: OpenedRun, tmp_path: Path) -> None:
    drawing = run.plot.heat_map()
    svg = drawing.save(tmp_path / "heat.svg").read_text()
    assert "var(" not in svg and "data-tip" not in svg and ".box.positive {fill: #0a6cb0;}" in svg
    html = drawing._repr_html_()
    style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    selectors = [part for found in re.findall(r"([^{}]+)\{", style) for part in found.split(",")]
    assert len(selectors) > 30 and all(part.strip().startswith(".patterning-figure") for part in selectors)
    assert "<script" not in html and "http" not in html.replace("http://www.w3.org", "")
    with pytest.raises(PatterningError, match=r"heat\.png: a figure is saved as \.svg, \.html or \.csv"):
        drawing.save(tmp_path / "heat.png")


def test_the_page_draws_what_the_functions_draw(trained: Path, run: OpenedRun) -> None:
    path = build_report(trained)
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 10_000_000 and "cannot be" not in page
    for drawing in (run.plot.token_map(), run.plot.heat_map(), run.plot.llc(), run.plot.ranks("step-0/everything")):
        figures = [figure for block in drawing.blocks if block.kind == "figures" for figure in block.figures]
        assert figures and all(figure.svg in page for figure in figures)
    assert all(block.title in page for block in run.plot.passages().blocks if block.kind == "passage")


def test_what_is_not_there_is_said(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    (copy / "response/groups.parquet").unlink()
    (copy / "data/tokenizer.json").unlink()
    plot = open_run(copy).plot
    with pytest.raises(PatterningError, match=r"run: response/groups\.parquet is not there: the probe has one domain"):
        plot.heat_map()
    with pytest.raises(PatterningError, match="the run keeps no text of its probe"):
        plot.passages()
    assert "sequence 0, position 1, token" in plot.token_map()._repr_html_()
    with pytest.raises(PatterningError, match="colour: 'law' is no column of the probe"):
        plot.token_map(colour="law")
    (copy / "response/diagnostics.json").unlink()
    with pytest.raises(PatterningError, match=r"diagnostics\.json is not there: stage sample is not done"):
        plot.llc()


def test_the_program_of_the_page_on_figures_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/how_to/figures.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "runs/quickstart" in program
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace("runs/quickstart", str(trained)), "figures.md", "exec"), {})
    assert {file.name for file in tmp_path.iterdir()} == {"map.svg", "map.csv", "heat.html"}
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named == {name for name in vars(type(open_run(trained).plot)) if not name.startswith("_")}
