"""The documentation site is built without a warning, asks no other host for anything, and fits a telephone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import pytest
import yaml
from jinja2 import Environment, FileSystemLoader

from imbvlm.config.input_sections import ClassSampling
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.sweep.records.summary_tables import HEADINGS
from imbvlm.sweep.records.trial_log import TrialKind, TrialState

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", TROUBLESHOOTING, re.MULTILINE)
TERMS = re.findall(r"^- \*\*(.+?)\.\*\*", GLOSSARY, re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is published, with the address of a repository."""
    folder = tmp_path_factory.mktemp("site")
    address = {"IMBVLM_REPOSITORY": "https://github.com/someone/imbvlm", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_built_without_a_warning_and_no_page_names_another_host_to_load_from(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) == len(list(DOCS.rglob("*.md"))) + len(["404.html"])
    loaded = (
        r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?:[^"]+)|<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]+)'
    )
    for page in pages:
        assert re.findall(loaded, page.read_text(encoding="utf-8")) == [], page


def test_the_site_has_the_theme_that_is_declared() -> None:
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!ENV", "")
    theme = yaml.safe_load(lines)["theme"]
    assert theme["name"] == "material"
    assert theme["font"] is False


def strings_of(path: Path) -> list[str]:
    """The texts of a module, with `...` for what is formatted into them."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            texts.append(node.value)
    return texts


@cache
def package_strings() -> list[str]:
    return [text for path in sorted((ROOT / "imbvlm").rglob("*.py")) for text in strings_of(path)]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_troubleshooting_is_one_of_the_program(message: str) -> None:
    """Each of its fragments in one text, in their order."""
    fragments = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    assert any(re.search(".*".join(fragments), text, re.DOTALL) for text in package_strings())


def words_of_the_report() -> list[str]:
    templates = ROOT / "imbvlm" / "sweep" / "report" / "templates"
    module: Any = Environment(loader=FileSystemLoader(templates)).get_template("words.html").module
    return [title for _, title, _ in module.WORDS]


def test_the_glossary_has_every_term_of_report_and_terminal_once_and_in_order() -> None:
    in_order = [term.lower().replace("-", " ") for term in TERMS]
    assert in_order == sorted(in_order)
    assert len(set(TERMS)) == len(TERMS)
    shown = {*words_of_the_report(), *get_args(TrialKind), *get_args(TrialState), *HEADINGS, *get_args(ClassSampling)}
    terms = {re.sub("[-_]", " ", term.lower()) for term in (*shown, *METHODS, *LOSSES, *SECOND_STAGES)}
    text = GLOSSARY.lower().replace("-", " ")
    assert [term for term in terms if not re.search(rf"\*\*[^*]*{re.escape(term)}|`{term}`", text)] == []


PAGES = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), ROOT / "cluster" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_outside_of_the_site_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


# ------------------------------------------------------------------------------------------------- in a browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def chromium(*arguments: str) -> str:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine; install it to see the site opened")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    return subprocess.run([program, *quiet, *arguments], capture_output=True, text=True, timeout=350, check=True).stdout


WIDTHS = re.compile(r" (/[\w./-]*)=(\d+)/(\d+)")
PROBE = """<iframe id="frame" width="{width}" height="900"></iframe><p id="out">widths:</p><script>
const pages = {pages}, frame = document.getElementById("frame"), out = document.getElementById("out");
frame.onload = () => setTimeout(() => {{
  const root = frame.contentDocument.documentElement;
  out.textContent += ` ${{pages.shift()}}=${{root.scrollWidth}}/${{root.clientWidth}}`;
  if (pages.length) frame.src = pages[0]; else out.textContent += " end";
}}, 300);
frame.src = pages[0];
</script>"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("width", [400, 1300])
def test_no_page_asks_another_host_or_is_wider_than_the_window(site: Path, tmp_path: Path, width: int) -> None:
    pages = sorted(f"/{path.relative_to(site).as_posix()}" for path in site.rglob("index.html"))
    # A frame of that width: headless windows have a least width of their own.
    (site / "probe.html").write_text(PROBE.format(width=width, pages=json.dumps(pages)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    log, origin = tmp_path / "net.json", f"http://127.0.0.1:{server.server_port}"
    try:
        shown = chromium(f"--log-net-log={log}", "--virtual-time-budget=100000", "--dump-dom", f"{origin}/probe.html")
    finally:
        server.shutdown()
    widths = {page: (int(page_width), int(window)) for page, page_width, window in WIDTHS.findall(shown)}
    assert sorted(widths) == pages
    assert {page: pair for page, pair in widths.items() if not pair[0] <= pair[1] <= width} == {}
    # Chromium marks requests of pages by this annotation (blink_resource_loader), and also makes others.
    asked = set(re.findall(r'"traffic_annotation":101845102,"url":"(https?://[^/"]+)', log.read_text()))
    assert asked == {origin}
