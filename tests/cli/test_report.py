"""The page of a quick start, from files made up here: every figure is theirs, and nothing else is needed to read it."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from jaxaroo.cli import report
from jaxaroo.cli.stages import SMOKE, stages, typed


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(right):
    return json.dumps({"n": 50, "accuracy": right, "interval": [right - 0.1, right + 0.1]})


@pytest.fixture
def out(tmp_path):
    """A folder in which all stages have run."""
    for name in ("policy", "strong"):
        lines(tmp_path / name / "metrics.jsonl", [{"step": i, "loss": 3.0 / i} for i in (1, 2, 3)])
    lines(tmp_path / "solutions.jsonl", [{"prompt": f"p{i // 2}"} for i in range(8)])
    lines(tmp_path / "pairs.jsonl", [{}] * 7)
    scored = {"prompt": "<script>alert(1)</script>\n", "steps": ["1 + 1 = 2", "ans 3"], "labels": [1, 0]}
    lines(tmp_path / "scored-tests.jsonl", [scored | {"scores": [0.93, 0.07]}])
    four = {"name": "4 bits", "perplexity": 1.2345, "accuracy": 0.62, "total": 196480}
    (tmp_path / "bits").mkdir()
    (tmp_path / "bits" / "bits.json").write_text(json.dumps({"measured": [four]}))
    for name, speedup in (("jakiro", 0.5), ("kangaroo", 1.25)):
        (tmp_path / "bench" / name).mkdir(parents=True)
        found = {"tau": 2.34, "speedup": speedup, "identical": 1.0}
        (tmp_path / "bench" / name / "report.json").write_text(json.dumps(found))
    said = {
        "policies": ["", "", answers(0.41), answers(0.83)],
        "rewards": ["", "", "", json.dumps({"solutions": 8, "kept": 5}), "", ""],
        "improve": ["", answers(0.52), "", "", "", answers(0.57)],
    }
    curve = lambda *values: [*values]
    said["rewards"] += [
        json.dumps({"auroc": 0.876}),
        json.dumps(
            {
                "k": [1, 2],
                "majority": curve(0.4, 0.45),
                "pass_at": curve(0.4, 0.6),
                "best_of": {"min": curve(0.4, 0.55)},
            }
        ),
    ]
    said["rewards"] += ["", "", answers(0.47)]
    ran = [
        {"stage": stage.name, "command": typed(args), "seconds": 1.5, "said": said.get(stage.name, [""] * 12)[i]}
        for stage in stages(tmp_path, SMOKE)
        for i, args in enumerate(stage.commands)
    ]
    lines(tmp_path / "stages.jsonl", ran)
    return tmp_path


class Page(html.parser.HTMLParser):
    """Text, pictures and whatever else a page might fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.words, self.pictures, self.open, self.others = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.pictures.append(given["src"])
        self.others += [given[name] for name in ("href", "srcset", "data") if name in given]
        self.others += [tag] if tag in ("script", "link", "iframe", "object") else []
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def written(out):
    text = report.write(out, stages(out, SMOKE)).read_text(encoding="utf-8")
    return text, Page(text)


def test_figures_are_those_of_the_files_and_the_page_needs_nothing_else(out):
    text, page = written(out)
    assert page.open == []
    assert page.others == []
    assert [p[:22] for p in page.pictures] == ["data:image/png;base64,"] * 3
    assert not re.search(r"https?://|@import|url\(", text)
    words = " ".join(" ".join(page.words).split())
    for figure in (
        "41.0 %",
        "83.0 %",
        "73.0 to 93.0 %",
        "47.0 %",
        "52.0 %",
        "57.0 %",
        "1.2345",
        "62.0 %",
        "196 kB",
        "2.34",
        "1.25",
    ):
        assert figure in words
    assert "wrote 8 solutions of 4 problems" in words
    assert "5 were kept" in words
    assert "87.6 %" in words
    assert "7 pairs" in words
    assert "55.0 %" in words
    assert "none pays here" not in words  # Kangaroo does
    assert "<script>" not in text  # a prompt's; it is shown as text
    assert "<script>alert(1)</script>" in words
    assert 'class="step wrong" title="0.07"' in " ".join(text.split())
    assert text.count("step wrong") == 1
    assert not [p for p in out.iterdir() if p.suffix == ".partial"]


def test_where_no_draft_pays_the_page_says_so(out):
    file = out / "bench" / "kangaroo" / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"speedup": 0.75}))
    assert "none pays here" in written(out)[0]


def test_stages_that_were_not_run_are_not_shown(out):
    kept = [line for line in (out / "stages.jsonl").read_text().splitlines() if '"stage": "policies"' in line]
    (out / "stages.jsonl").write_text("\n".join(kept) + "\n")
    text, page = written(out)
    assert "Two policies" in text
    assert len(page.pictures) == 1
    assert not any(title in text for title in ("reward model</h2>", "four widths", "Drafts that"))


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
QUIET += ["--virtual-time-budget=5000", "--dump-dom"]
LOOK = """<script>addEventListener("load", () => {
const shown = image => image.naturalWidth > 200 && image.getBoundingClientRect().width > 200;
const images = [...document.images].map(image => image.complete && shown(image));
const wide = document.documentElement.scrollWidth > innerWidth;
document.title = JSON.stringify({images, wide, headings: document.querySelectorAll("h2").length});
});</script>"""


@pytest.mark.slow
def test_a_browser_shows_every_picture_and_complains_of_nothing(out, tmp_path_factory):
    """The page as it is has no script; the copy that is looked at has one that looks."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on the PATH to look at the page with")
    folder = tmp_path_factory.mktemp("browser")
    text = written(out)[0]
    (folder / "page.html").write_text(text.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    command = [browser, *QUIET, f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in found.stderr
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", found.stdout, re.S)[1]))
    assert seen == {"images": [True] * 3, "wide": False, "headings": 5}
