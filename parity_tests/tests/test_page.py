"""The HTML page in a real browser: it draws what the rows say, its filter works, and no text is cut off."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest

from parity_tests.judge.records import ParityRow, environment
from parity_tests.report.html import ABOVE, Block, Curves, colour, heatmap, html_document

BROWSER = next(
    (found for name in ("chromium-headless-shell", "chromium", "google-chrome") if (found := shutil.which(name))), None
)
ROW = ParityRow(
    kind="oracle",
    framework="torch",
    implementation="matmul",
    mode="eager",
    dtype="float32",
    case="square",
    tensor="y",
    status="ok",
    max_abs_error=1e-7,
    bound_fraction=0.25,
    partition_fractions=(0.1, 0.25, 0.0),
)
BAD = dataclasses.replace(
    ROW,
    implementation="loop",
    status="mismatch",
    reason="y[0] is <1>",
    bound_fraction=3.0,
    partition_fractions=(0, 3, 0),
)
MAPPED = dataclasses.replace(ROW, mode="vmap", bound_fraction=0.5, partition_fractions=(0.5, 0.5, 0.5))
PAIR = dataclasses.replace(
    ROW, kind="pair", framework="torch+jax", implementation="matmul+linen", mode="eager+jit", partition_fractions=None
)
MODE = dataclasses.replace(ROW, kind="mode", mode="vmap+eager", partition_fractions=None)
CRITERION = ParityRow("training", "torch+jax", "mlp: adam", "float32", "semantic (jax)", "", "ok", bound_fraction=0.02)
CURVES = Curves("a loss", {"torch": [2.0, 1.0, 0.5], "jax": [2.0, 1.0, 0.5]}, ([1.9, 0.9, 0.4], [2.1, 1.1, 0.6]))
ROWS = [ROW, BAD, MAPPED, PAIR, MODE, CRITERION]
# Appended to the page: filters as a reader would, then writes what the reader would see into the document.
PROBE = """<script>
const words = document.getElementById("filter");
words.value = "mismatch"; words.dispatchEvent(new Event("input"));
const boxes = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
const texts = [...document.querySelectorAll("svg text")].map(text => {
  const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
  return inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && inner.top >= outer.top - 1
    && inner.bottom <= outer.bottom + 1 ? null : text.textContent;
}).filter(Boolean);
const seen = {
  shown: document.getElementById("shown").textContent,
  visible: [...document.querySelectorAll("#rows tbody tr")].filter(row => row.offsetHeight > 0).length,
  drawn: boxes.every(box => box.width > 50 && box.height > 10),
  drawings: boxes.length,
  cut: texts,
  words: document.querySelectorAll("svg text").length,
  above: [...document.querySelectorAll("rect")]
    .filter(cell => getComputedStyle(cell).fill === "rgb(176, 20, 42)").length,
  lines: [...document.querySelectorAll("polyline")].every(line => line.getTotalLength() > 100),
  wide: document.documentElement.scrollWidth <= document.documentElement.clientWidth,
};
const told = document.createElement("pre");
told.id = "seen"; told.textContent = JSON.stringify(seen); document.body.append(told);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here to render the page with")
def test_a_browser_draws_the_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(html_document(ROWS, environment(), [CURVES]).replace("</body>", PROBE))
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000",
         "--virtual-time-budget=2000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (found,) = re.findall(r'<pre id="seen">(.*?)</pre>', result.stdout)
    seen = json.loads(html.unescape(found))
    assert seen["shown"] == "1 of 6 rows"
    assert seen["visible"] == 1
    # A legend; float32, float32 in vmap; the pairs and the mode; the criteria; the curves.
    assert seen["drawings"] == 1 + 2 + 2 + 1 + 1
    assert seen["drawn"]
    assert seen["lines"]
    assert seen["cut"] == [], "text outside its drawing"
    assert seen["words"] > 10
    assert seen["wide"], "the page scrolls sideways"
    # The legend's sample, the tensor and the partition of the mismatch.
    assert seen["above"] == 3


def test_partitions_are_drawn_with_their_own_values():
    text = html_document(ROWS, environment())
    assert "torch matmul, 1: 0.25" in text
    assert "torch matmul, 2: 0" in text
    assert "torch loop, 1: 3" in text
    assert "matmul, linen: 0.25" in text
    assert "torch matmul, vmap: 0.25" in text
    assert "mlp: adam, semantic (jax): 0.02" in text


def test_an_interrupted_run_says_so():
    assert "interrupted with 7 cells left" in html_document([ROW], environment(), cells_left=7)
    assert "interrupted" not in html_document([ROW], environment())


def test_the_scale_runs_from_exact_to_above():
    assert colour(1.01) == colour(float("inf")) == colour(float("nan")) == ABOVE
    assert len({colour(fraction) for fraction in (0.0, 0.003, 0.03, 0.3, 1.0, 2.0)}) == 6


def test_many_partitions_stay_within_the_page():
    columns = [str(k) for k in range(400)]
    drawing = heatmap("wide", ["line"], [Block(columns, {"line": dict.fromkeys(columns, 0.5)})])
    assert float(re.search(r'svg width="(\d+)"', drawing)[1]) < 900
    assert drawing.count("<rect") == 400
    assert drawing.count("rotate(") < 100
