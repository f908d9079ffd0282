"""The report in a real browser: nothing on its console, and no page wider than a narrow screen."""

from __future__ import annotations

import html
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from patterning_dist.report import build_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH; install it to have the page looked at")

sys.path.append(str(Path(__file__).parents[1] / "unit"))
write_run = importlib.import_module("report_fixture").write_run
write_measured = importlib.import_module("measured_run").write_measured

# A browser window is at least 500 pixels wide, so the page is put in a frame and tells the page around it.
MEASURE = """<script>addEventListener("load", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const token = document.querySelector(".lines [data-tip]");
  token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const drawings = document.querySelectorAll("svg").length;
  const told = document.getElementById("tip").textContent;
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, drawings, told].join("|"), "*");
});</script></body>"""


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts ran, and the browser's log."""
    command = [
        BROWSER,
        *FLAGS.split(),
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=4000",
        "--window-size=1280,1600",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=90, check=True)
    return done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return build_report(write_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Maps and heat maps are drawn of chi that repeats."""
    return build_report(write_measured(tmp_path_factory.mktemp("runs") / "run", {"early": 0.5, "final": 1.0}))


def test_the_console_stays_empty(report, tmp_path):
    document, log = browse(report, tmp_path)
    assert "<h1>induction-small</h1>" in document
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []


@pytest.mark.parametrize("width", [1280, 400, 320])
@pytest.mark.parametrize("of", ["report", "measured"])
def test_the_page_is_never_wider_than_its_window(request, tmp_path, of, width):
    measured = request.getfixturevalue(of).read_text(encoding="utf-8").replace("</body>", MEASURE)
    around = tmp_path / "around.html"
    around.write_text(
        f'<body><iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(measured)}">'
        '</iframe><script>addEventListener("message", (event) => {'
        "document.body.dataset.measured = event.data; });</script></body>",
        encoding="utf-8",
    )
    document, log = browse(around, tmp_path / "profile")
    found = re.search(r'data-measured="(\d+)\|(\d+)\|(\d+)\|([^"]*)"', document)
    assert found, log[-2000:]
    assert int(found[1]) == width and int(found[2]) <= width
    assert int(found[3]) > 25
    assert re.fullmatch(r"sequence \d+, position \d+", found[4])
