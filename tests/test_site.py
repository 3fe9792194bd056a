"""The site that `make docs` makes of docs/: whole, self-contained, and fit for any screen."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report import BROWSERS

ROOT = Path(__file__).parent.parent


class Reader(HTMLParser):
    """Notes what a page loads, as against what it only links to."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loaded.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster", "action") if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, from a copy."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("_build"))
    for name in ("Makefile", "CHANGELOG.md", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    command = ["make", "-o", f"{sys.prefix}/.installed", f"VENV={sys.prefix}", "docs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    page = folder / "docs" / "_build" / "html"
    assert "docs/_build/html/index.html" in done.stdout and (page / "index.html").is_file()
    return page


@pytest.mark.slow  # half a minute; a link to nowhere or a docstring that Sphinx cannot read is an error
def test_site_holds_every_page_and_loads_nothing_from_elsewhere(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").glob("**/*.md")}
    assert all((site / page).is_file() for page in pages)
    for path in site.rglob("*.html"):
        reader = Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        assert len(reader.loaded) > 5
        for address in reader.loaded:
            assert not re.match(r"\w+:|//", address), (path.name, address)
    for path in [*site.rglob("*.css"), *site.rglob("*.html")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text), path.name
    reference = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text(encoding="utf-8"))
    assert "RepCodec(dim: int" in reference and "from_published(path: Path | str" in reference
    assert "usage: repcodec tokenize" in (site / "commands.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_site_fits_the_screen_and_asks_no_other_host(site, width, scheme):
    from playwright.sync_api import sync_playwright

    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on the PATH")
    asked, said = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        for path in sorted(site.glob("**/*.html")):
            page.goto(path.as_uri())
            page.wait_for_load_state()
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
            broken = "[...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src)"
            assert page.evaluate(broken) == []
        browser.close()
    assert len(asked) > 20 and all(address.startswith(("file:", "data:")) for address in asked)
    assert said == []
