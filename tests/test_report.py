import csv
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from test_report_examples import spoken
from test_report_tables import features, result

from repcodec.errors import RepCodecError
from repcodec.report import flat_rows, log_table, print_table, write_report

PHONES = ["a", "<b>", "c", "d", "e"]
EVIL = [
    "<script>evil=1</script>",
    "\"'><img src=x onerror=evil=1>",
    "javascript:evil=1",
    "| a | `b` |",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def measured():
    """Two tokenizers and the features, with something of everything; names and warnings are hostile."""
    whole = {
        "cosine_similarity": 0.9, "entropy_bits_per_second": 250.0, "deduplicated_per_second": 33.3,
        "corpus_used_share": 1.0, "phone_purity": 0.5, "cluster_purity": 0.1, "v_measure": 0.4, "abx_within": 0.05,
        "abx_across": 0.07, "abx_reconstruction_within": 0.04, "abx_reconstruction_across": 0.06,
        "unit_edit_distance": {"noise": 0.4, "speed": 0.3}, "phone_error_rate": 0.3, "valid_normalized_error": 0.5,
        "phone_error_rates": [0.29, 0.3, 0.31], "intervals": {"pnmi": (0.58, 0.63), "normalized_error": (0.38, 0.43)},
    }  # fmt: skip
    one = result(EVIL[0], normalized_error=0.41, **whole, warnings=[EVIL[1]])
    two = result("RepCodec 64, " + "long-folder-name/" * 6, **{**whole, "v_measure": float("nan"), "intervals": {}})
    one.curve = [(0, 0.9), (50, 0.7), (100, 0.6)]
    return [features(abx_across=0.04, phone_error_rate=0.2), one, two]


class Reader(HTMLParser):
    """Notes a page's tags, attributes and addresses."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.sources = Counter(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]


FACTS = {"features": EVIL[1], "phone_labels": f"{EVIL[2]}, {EVIL[3]}"}


@pytest.fixture(scope="module")
def report(speech, tmp_path_factory):
    """The report's folder, with three real utterances."""
    folder = tmp_path_factory.mktemp("report")
    examples, phones = spoken(speech)
    for i, example in enumerate(examples):
        example.utterance = f"{example.utterance} {EVIL[i]}"
        example.codes = {EVIL[0]: example.codes["k-means 64"], "<i>another</i>": example.codes["RepCodec 64"]}
        example.phones[0] = (*example.phones[0][:2], "<b>")
    results = measured()
    counts = np.random.default_rng(0).integers(0, 9, (len(phones), 64))
    results[1].joint = counts
    results[2].joint = counts[:, ::-1]
    write_report(folder, results, FACTS, phones, examples)
    return folder


def test_everything_is_there_and_the_page_needs_nothing_else(report):
    pictures = {"normalized_error", "pnmi", "abx_across", "phone_error_rate", "training", "usage",
                "phones_0", "phones_1"}  # fmt: skip
    files = {"report.html", "results.json", "results.csv", "results.md"}
    assert {path.name for path in report.iterdir()} == files | {f"{name}.png" for name in pictures}
    page = (report / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    reader = Reader()
    reader.feed(page)
    assert len(reader.sources) > 15
    assert all(source.startswith(("data:", "#")) for source in reader.sources)
    assert not [name for name in reader.attributes if name.startswith("on") or name == "style"]
    assert reader.tags["script"] == reader.tags["style"] == 1, "only its own"
    assert reader.tags["img"] == 2 * len(pictures)
    assert not re.search("https?://", page)
    assert page.count("data:audio/flac;base64,") == 3
    assert len(page) < 3e6


def test_json_and_csv_hold_the_same_figures(report):
    text = (report / "results.json").read_text()
    found = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert found["features"] == FACTS["features"]
    names = [row["name"] for row in found["rows"]]
    assert names[0] == EVIL[0] and names[2] == "features", "the ceiling is last"
    assert found["rows"][1]["v_measure"] is None, "was not a number"
    with open(report / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, expected in zip(rows, found["rows"], strict=True):
        for field, value in expected.items():
            if isinstance(value, int | float):
                assert float(row[field]) == value
            elif value is None:
                assert not row.get(field)
    assert (rows[0]["pnmi_low"], rows[0]["pnmi_high"], rows[1]["pnmi_low"]) == ("0.58", "0.63", "")
    assert (rows[0]["unit_edit_distance_noise"], rows[0]["phone_error_rates_3"]) == ("0.4", "0.31")
    assert rows[0]["warnings"] == EVIL[1]


def test_values_of_numpy_are_written_too(tmp_path):
    row = result("k-means 64", pnmi=np.float64(0.5), intervals={"pnmi": (np.float64(0.4), np.float32("nan"))})
    write_report(tmp_path, [row], {}, None)
    (found,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (found["pnmi"], found["intervals"]["pnmi"]) == (0.5, [0.4, None])


def test_markdown_is_tables_of_even_rows(report):
    text = (report / "results.md").read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == 8, "the overview and a table a group"
    for block in blocks:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1
        assert len(block.splitlines()) == 5
    assert "**0.410**<br><sub>0.380–0.430</sub>" in blocks[0]
    assert "<ins>" not in text, "all have the same rate"
    assert "30.0%<br><sub>± 1.0%</sub>" in text
    assert not re.search(r"<(?!br>|/?sub>|/?ins>)|\]\(|(?<!\\)`", text), "no tag but its own, no link, no code"
    assert r"\| a \| \`b\` \|" in text
    assert "&lt;script&gt;evil=1" in text


def test_the_same_results_give_the_same_bytes(report, tmp_path):
    results = measured()
    results[1].joint = results[2].joint = None  # saves time: the plots' own test draws phones twice
    for name in ("one", "two"):
        write_report(tmp_path / name, results, FACTS, PHONES)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 10 and one == two
    assert one["results.csv"] == (report / "results.csv").read_bytes()


def test_terminal_shows_the_overview_and_the_warnings(capsys):
    print_table([*measured(), result("[bold]k-means[/bold] 64", warnings=["few frames"])], "title [red]")
    shown = capsys.readouterr().out
    assert "title [red]" in shown
    assert "0.410" in shown and "± 1.0%" in shown and "–" in shown
    assert "[bold]k-means[/bold] 64: few frames" in shown


def test_wandb_gets_the_results_as_a_table(tmp_path, monkeypatch):
    from repcodec.dashboards import WandbRun

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = WandbRun(project="repcodec", name="evaluation", save_dir=str(tmp_path)).experiment
    log_table(measured(), run)
    run.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/files/media/table/evaluation*.json")
    table = json.loads(path.read_text())
    columns, rows = flat_rows([*measured()[1:], *measured()[:1]])
    assert table["columns"] == columns
    assert table["data"] == [list(row.values()) for row in rows]


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RepCodecError, match="could not be written"):
        write_report(tmp_path / "file", [result("one")], {}, None)


def test_no_result_is_one_sentence(tmp_path):
    with pytest.raises(RepCodecError, match="name at least one tokenizer"):
        write_report(tmp_path, [], {}, None)
    assert list(tmp_path.iterdir()) == []


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, driven by Playwright."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here (.ci/run installs Debian's): the report was not looked at in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, report):
    """Open the page in a window; whatever it asks for or says is noted, and fails the test at its end."""
    asked, said, contexts = [], [], []

    def open_page(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((report / "report.html").as_uri())
        page.wait_for_function("[...document.images].every(i => i.complete)")
        return page

    yield open_page
    assert asked, "the page itself at least"
    assert not [url for url in asked if not url.startswith(("data:", (report / "report.html").as_uri()))]
    assert said == []
    assert [context.close() for context in contexts]


def test_page_renders_with_sound(show):
    page = show()
    assert page.evaluate("window.evil") is None
    pictures = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt.length])")
    assert len(pictures) == 16 and all(width > 100 and alt > 10 for width, alt in pictures)
    page.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.readyState > 0)")
    lengths = page.evaluate("[...document.querySelectorAll('audio')].map(a => [a.duration, a.error])")
    seconds = page.evaluate("[...document.querySelectorAll('.sheet')].map(s => Number(s.dataset.seconds))")
    assert len(lengths) == 3
    for (duration, error), expected in zip(lengths, seconds, strict=True):
        assert error is None
        assert duration == pytest.approx(expected, abs=0.01)
    assert page.inner_text(".example h3").endswith(EVIL[0]), "as text"
    best = page.evaluate("[...document.querySelectorAll('td.best b')].map(b => getComputedStyle(b).fontWeight)")
    assert best and all(int(weight) >= 600 for weight in best)


def test_click_on_an_utterance_plays_from_there_under_a_line(show):
    page = show()
    sheet, audio = page.locator(".sheet").nth(1), page.locator("audio").nth(1)
    page.evaluate("document.querySelectorAll('audio').forEach(a => a.muted = true)")
    assert page.locator(".playhead").nth(1).is_hidden()
    box = sheet.bounding_box()
    sheet.click(position={"x": 500, "y": box["height"] / 2})
    page.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 0")
    played, seconds = audio.evaluate("a => [a.currentTime, a.duration]")
    assert played >= 500 / box["width"] * seconds - 0.05
    page.wait_for_function("document.querySelectorAll('.playhead')[1].getBoundingClientRect().x > 100")
    line = page.locator(".playhead").nth(1).bounding_box()
    assert line["x"] >= box["x"] + 500 - 4
    page.evaluate("document.querySelectorAll('audio')[0].play()")
    page.wait_for_function("document.querySelectorAll('audio')[1].paused")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_page_is_no_wider_than_the_screen(show, width):
    page = show(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in page.query_selector_all(".box"):
        name = box.query_selector("tbody th")
        before = name.bounding_box()["x"]
        moved = box.evaluate("b => { b.scrollLeft = 1e4; return b.scrollLeft }")
        assert name.bounding_box()["x"] == pytest.approx(before, abs=1), "the names stay where they are"
        assert moved == 0 or width < 1280
    if width == 390:
        font = page.evaluate("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)")
        assert font >= 13


def test_dark_page_has_dark_plots(show):
    page = show(color_scheme="dark")
    shades = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(shades) < 60
    shown = page.evaluate("[...document.images].filter(i => i.offsetParent).map(i => i.className)")
    assert len(shown) > 4 and set(shown) == {"dark"}


def test_print_is_light_and_cuts_nothing(show):
    page = show(690, color_scheme="dark")  # A4 without its margins
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown = page.evaluate("[...document.images].filter(i => i.offsetParent).map(i => i.className)")
    assert set(shown) == {"light"}
    edges = "[...document.querySelectorAll('table, img.light, .sheet, .sheet svg')].map(e => e.getBoundingClientRect())"
    assert page.evaluate(f"Math.max(...{edges}.map(b => b.right))") <= 690
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 15


def test_policy_lets_no_request_out(browser, report):
    """Were anything of the page to ask for an address, the browser would refuse."""
    page = browser.new_page()
    asked = []
    page.goto((report / "report.html").as_uri())
    page.route("**/*", lambda route: (asked.append(route.request.url), route.abort()))
    page.evaluate(
        """async () => {
            const add = (tag, values) => document.body.appendChild(Object.assign(document.createElement(tag), values));
            add("img", {src: "http://127.0.0.1:9/a.png"});
            add("script", {text: "window.evil = 1"});
            add("form", {action: "http://127.0.0.1:9/b"}).submit();
            await fetch("http://127.0.0.1:9/c").catch(() => {});
        }"""
    )
    assert page.evaluate("window.evil") is None
    assert asked == []
    assert page.url == (report / "report.html").as_uri()
    page.close()
