"""report.html: what it holds, how large it is, and that a browser shows it without an error."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import scored
from fewstep.report.charts import distance_by_guidance, distance_by_nfe
from fewstep.report.page import Content, explained, write_page
from fewstep.report.pictures import Picture, lines_that_fit
from fewstep.report.published import as_text, beside, published, with_published
from scored import frame

FLOOR = {"value": 2.5, "classes": {"0": 1.0, "1": 2.0}}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def row(name: str, nfe: int, value: float, **changes: object) -> dict[str, Any]:
    known: dict[str, object] = {
        "nfe": nfe,
        "std": 0.1,
        "metrics": {
            "FD-EffLite0": {"value": value, "std": 0.1, "std_of": "ranges"},
            "recall": {"value": 0.5, "std": None, "std_of": None},
        },
        "classes": {"0": value, "1": 2 * value},
    }
    return scored.row(name, nfe, value) | known | changes


def picture(name: str, size: int = 16, channels: int = 1, count: int = 20) -> Picture:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, size, size), np.uint8)
    return Picture(name, "a caption", images, 10)


def content(scores: list[dict[str, Any]], **changes: Any) -> Content:  # noqa: ANN401
    kimg = np.linspace(1, 50, 60)
    loss = pd.DataFrame({"model": "cd", "name": "loss", "kimg": kimg, "value": 1 / kimg})
    validation = loss[::20].assign(name="validation/FD-EffLite0", value=100 / kimg[::20])
    known: dict[str, Any] = {
        "title": "Samples <of> a test",
        "caption": "How to read it & more.",
        "rows": frame(*scores),
        "floor": FLOOR,
        "samples": [picture("real images"), *(picture(r["row"]) for r in scores)],
        "samples_note": "Seeds 0 to 19.",
        "moments": {"cd": picture("cd: the same seeds over time")},
        "neighbours": [picture(r["row"]) for r in scores],
        "neighbours_note": "Nearest.",
        "logs": pd.concat([loss, validation]),
        "provenance": {"commit": "0123456789abcdef" * 4},
        "records": {r["row"]: {"value": r["value"]} for r in scores},
        "configuration": "seed: 0\n",
        "published": published("FD-EffLite0", 16, 10, None),
    }
    known["logs"]["nimg"] = (1000 * known["logs"]["kimg"]).astype(int)
    return Content(**(known | changes))


ROWS = [row("one", 1, 50.0), row("four", 4, 12.0), row("eight", 8, 8.0, std=None)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(content(ROWS), path)
    return path


class Addresses(HTMLParser):
    """All that the page would fetch, and the headings of its sections."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.ids.add(known.get("id", ""))
        if tag not in ("a", "use"):
            self.found += [known[key] for key in ("src", "href", "srcset", "data") if key in known]


def test_the_page_fetches_nothing_and_escapes_text(page: Path) -> None:
    text, parser = page.read_text(), Addresses()
    parser.feed(text)
    assert parser.found and all(address.startswith("data:") for address in parser.found)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "Samples &lt;of&gt; a test" in text and "read it &amp; more" in text


def test_every_link_of_the_page_leads_to_a_section(page: Path) -> None:
    text, parser = page.read_text(), Addresses()
    parser.feed(text)
    links = re.findall(r'<a href="#([^"]+)"', text)
    assert len(links) == 8 and set(links) <= parser.ids


def test_a_validation_that_worsens_is_a_warning_above_the_charts(tmp_path: Path) -> None:
    logs = content(ROWS).logs
    logs.loc[logs["name"] != "loss", "value"] = [1.0, 2.0, 3.0]
    more = logs.tail(1).assign(kimg=60.0, value=4.0)
    recall = logs.tail(3).assign(name="validation/recall", value=[0.7, 0.6, 0.5])
    logs = pd.concat([logs, more, recall])
    logs["nimg"] = (1000 * logs["kimg"]).astype(int)
    path = tmp_path / "report.html"
    write_page(content(ROWS, logs=logs), path)
    text = path.read_text()
    assert '<p class="warning">cd: validation has worsened three times in a row since 1 k' in text
    assert "Recall against training images" in text and "Brightness against" not in text


def test_the_page_of_twenty_large_rows_stays_below_five_megabytes(tmp_path: Path) -> None:
    rows = [row(f"row-{i}", i + 1, 50.0 / (i + 1)) for i in range(20)]
    lines = lines_that_fit(21, 10, (3, 64, 64))
    pictures = [picture(name, 64, 3, 10 * lines) for name in ["real", *(r["row"] for r in rows)]]
    path = tmp_path / "report.html"
    write_page(content(rows, samples=pictures, neighbours=[]), path)
    assert path.stat().st_size < 5e6
    assert lines_that_fit(9, 10, (1, 16, 16)) == 5


def test_colours_of_charts_are_those_of_the_page() -> None:
    svg = distance_by_nfe(frame(*ROWS), 2.5)
    assert svg.startswith("<svg ") and "var(--model-0)" in svg and "#2f6db3" not in svg
    assert 'height="' not in svg.partition(">")[0]
    assert ">cd<" in svg and "network calls per image" in svg, "text, not outlines"


def test_guidance_is_drawn_where_rows_differ_in_it_alone() -> None:
    assert distance_by_guidance(frame(*ROWS)) is None
    guided = row("guided", 16, 7.0, steps=8, guidance_scale=1.5)
    svg = distance_by_guidance(frame(*ROWS, guided))
    assert svg is not None and "guidance scale" in svg


def test_many_classes_show_the_extremes(tmp_path: Path) -> None:
    classes = {str(c): float(c + 1) for c in range(1000)}
    write_page(content([row("one", 1, 5.0, classes=classes)]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "10 classes drawn best and worst, of 1000" in text
    assert ">class 999<" in text and ">class 500<" not in text


def test_the_teacher_stands_beside_a_slider_that_goes_from_the_best_row_on(tmp_path: Path) -> None:
    rows = [
        row("cd-8", 8, 8.0),
        row("teacher-euler-4", 4, 30.0, student="teacher", sampler="euler"),
        row("cd-8-guided", 8, 7.0, guidance_scale=1.5),
        row("teacher-heun-7", 7, 9.0, student="teacher", sampler="heun"),
        row("cd-4", 4, 12.0),
        row("teacher-euler-2", 2, 60.0, student="teacher", sampler="euler"),
        row("cd-4-guided", 4, 11.0, guidance_scale=1.5),
    ]
    write_page(content(rows), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    cd = ["cd-8-guided", "cd-8", "cd-4-guided", "cd-4"]
    slides = [*cd, "teacher-euler-4", "teacher-euler-2"]
    near = ["teacher-heun-7", *slides]
    shown = re.findall(r"<figcaption><b>([^<]+)</b>", text)
    neighbours_and_training = [*near, "cd: the same seeds over time"]
    assert shown == ["teacher-heun-7", *slides, "real images", *neighbours_and_training]


def test_cards_judge_students_by_the_teacher_at_its_best(tmp_path: Path) -> None:
    teacher = [
        row(f"teacher-{nfe}", nfe, value, student="teacher") for nfe, value in ((8, 30.0), (35, 10))
    ]
    write_page(content([*teacher, row("cd-8", 8, 10.5)]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<span>8 calls</span><b>10.5</b><span>cd-8: 1.05 × the teacher&#39;s 35</span>" in text
    assert "<b>10.0</b><span>teacher-35: the teacher&#39;s best</span>" in text


def test_words_are_explained_once_in_a_text_and_never_within_a_word() -> None:
    text = str(explained("FD-EffLite0 at 8 NFE; 4 NFE, recall & recalled"))
    assert text.count("<abbr") == 3 and text.endswith("4 NFE, " + text[text.rindex("<abbr") :])
    assert ">FD-EffLite0</abbr>" in text and ">recall</abbr> &amp; recalled" in text


# --- published values ---------------------------------------------------------------------------


EDM = {"url": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz", "sha256": "1"}
IMAGENET = published("FID", 64, 1000, EDM)


def test_published_values_stand_only_beside_scores_against_the_same_reference() -> None:
    assert len(IMAGENET) and all(IMAGENET["source"])
    others = ("VIRTUAL_imagenet64_labeled.npz", "imagenet-64x64.npz/mine.npz")
    for reference in (None, *({**EDM, "url": f"https://x.org/{name}"} for name in others)):
        assert published("FID", 64, 1000, reference).empty
    shapes = [("FD-EffLite0", 64, 1000), ("FD-Inception", 64, 1000), ("FID", 64, 10)]
    for shape in [*shapes, ("FID", 32, 1000), ("FID", 32, 10)]:
        assert published(*shape, EDM).empty


def test_published_values_stand_beside_their_like() -> None:
    teacher = row("t", 511, 1.4, student="teacher", sampler="churn")
    assert as_text(beside(teacher, IMAGENET)) == "1.36 (EDM: stochastic sampler, lowest of 3 seeds)"
    assert set(beside(row("cd", 8, 2.0), IMAGENET)["fid"]) == {2.3, 1.4}
    assert beside(row("cd", 3, 2.0), IMAGENET).empty
    assert beside(row("t", 35, 1.9, student="teacher", sampler="heun"), IMAGENET).empty


def test_published_values_have_a_table_and_a_column_of_their_own(tmp_path: Path) -> None:
    rows = [row("cd-8", 8, 2.1)]
    beside_ours = with_published(frame(*rows), IMAGENET)
    write_page(content(rows, rows=beside_ours, published=IMAGENET), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "2.3 (EpiGenomics CD: 157.7 million images)" in text and "Published by others" in text


# --- in a browser -------------------------------------------------------------------------------

PROBE = """
<script>
window.addEventListener("load", () => {
  const clipped = [...document.querySelectorAll("h1, h2, h3, p, .card span, figcaption, svg text")]
    .filter((e) => e.getClientRects().length)
    .filter((e) => { const r = e.getBoundingClientRect(); return r.left < -1 || r.right > innerWidth + 1; });
  const head = document.querySelectorAll("#results ~ .scroll th button")[1];
  head.click(); // by value, lowest first
  const first = document.querySelector("#results ~ .scroll tbody td").textContent;
  const slider = document.querySelector(".viewer input");
  slider.value = 2; slider.dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll(".viewer")[0].querySelectorAll("figure")].filter((f) => !f.hidden);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); // WCAG 2.1
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const faint = [...document.querySelectorAll("h1, h2, p, a, b, th, td, figcaption, summary, footer, svg text")]
    .filter((e) => { const s = getComputedStyle(e); return contrast(light(e.closest("svg") ? s.fill : s.color), paper) < 4.5; });
  const said = {
    width: innerWidth, dark: dark, darkPaper: paper < 0.2, faint: faint.map((e) => e.textContent.slice(0, 40)),
    clipped: clipped.map((e) => e.textContent.trim().slice(0, 40)),
    wide: document.documentElement.scrollWidth > innerWidth + 1,
    charts: [...document.querySelectorAll("figure svg")].every((s) => s.getBoundingClientRect().height > 100),
    pictures: [...document.images].every((i) => i.naturalWidth > 0),
    first: first, shown: shown.map((f) => f.querySelector("b").textContent),
  };
  console.log("SAID " + JSON.stringify(said));
});
</script></body>"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_an_error_and_clips_nothing(
    width: int, scheme: str, page: Path, tmp_path: Path
) -> None:
    (tmp_path / "probed.html").write_text(page.read_text().replace("</body>", PROBE))
    frame = tmp_path / "frame.html"  # no window of Chromium is as narrow as a phone
    frame.write_text(
        f"<meta name=color-scheme content='light dark'><body style='margin: 0'><iframe "
        f"src=probed.html width={width} height=900 style='border: 0'></iframe></body>"
    )
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += [
        "--enable-logging=stderr",
        "--window-size=1300,900",
        f"--user-data-dir={tmp_path}",
        f"--screenshot={tmp_path}/shot.png",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        frame.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and "SAID" in console[0], run.stderr
    for said in (
        f'"width":{width}',
        f'"dark":{str(scheme == "dark").lower()}',
        f'"darkPaper":{str(scheme == "dark").lower()}',
        '"faint":[]',
        '"clipped":[]',
        '"wide":false',
        '"charts":true',
        '"pictures":true',
        '"first":"eight"',
        '"shown":["one"]',  # the worst comes last
    ):
        assert said in console[0].replace('\\"', '"')
