"""The report's page: complete, self-contained, readable without eyes, and the same in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf, nan
from pathlib import Path
from threading import Thread

import pytest

from qwen2tool.errors import UserError
from qwen2tool.verify.layer_figures import PARTS
from qwen2tool.verify.page import render, write_page
from qwen2tool.verify.plots import Line, line_plot
from qwen2tool.verify.report import Report
from tests.verify.faults import FAULTS
from tests.verify.zoo_run import Keeper, judge_fault, keeper_of

FAULT = next(fault for fault in FAULTS if fault.name == "v bias of the middle layer zero")
VOID = {"meta", "circle", "line", "path", "br"}
NORMS = {"q": [(1.0, 1.0), (2.0, None)], "k": [(300.0, 300.0), (2.0, 0.0)], "v": [(0.2, 0.2), (2.0, 2.0)]}


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    return keeper_of("tiny-qwen2", tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def report(keeper: Keeper) -> Report:
    return judge_fault(keeper, FAULT, keeper.folder / "damaged")


class Outline(HTMLParser):
    """Checks nesting, and collects tags with attributes, ids, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open:
            self.text.append((self.open[-1], data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


def test_verdict_first_then_diagnosis_plots_and_tables(report: Report) -> None:
    page = render(report, NORMS)
    outline = Outline(page)
    words = "".join(text for tag, text in outline.text if tag not in ("style", "title"))
    order = ["The candidate is another function", "bias of layer 2 is zero", "Diagnosis"]
    order += [
        "first that the reference's own noise",
        "What both predict",
        "Layer by layer",
        "Biases",
        "Tensors",
        "model.layers.2.self_attn.v_proj.bias",
        "torch",
    ]
    positions = [words.index(text) for text in order]
    assert positions == sorted(positions)
    plots = len(PARTS) + 3
    assert outline.count("figure") == outline.count("details") == plots
    assert [t for t, a in outline.tags if t == "svg" and a.get("role") == "img"] == ["svg"] * plots
    assert len(outline.ids()) == len(set(outline.ids()))


def test_every_plot_has_its_name_its_description_and_its_numbers(report: Report) -> None:
    outline = Outline(render(report, NORMS))
    named = [str(a["aria-labelledby"]).split() for t, a in outline.tags if t == "svg" and a.get("role") == "img"]
    assert {name for names in named for name in names} <= set(outline.ids())
    descriptions = [text for tag, text in outline.text if tag == "desc"]
    assert len(descriptions) == len(named)
    v = next(text for text in descriptions if text.startswith("v projection over 5 layers"))
    assert re.search(r"own error from 0 to 1\.\d+ \(layer 2\)", v)
    cells = [text for tag, text in outline.text if tag == "td"]
    assert len(cells) > 5 * len(PARTS) * 4


def test_nothing_is_fetched_and_nothing_runs(report: Report) -> None:
    outline = Outline(render(report, NORMS))
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in outline.tags}
    assert not [a for _, attributes in outline.tags for a in attributes if a in ("src", "href") or a.startswith("on")]
    assert "url(" not in render(report) and "@import" not in render(report)
    assert "default-src 'none'" in render(report)


def test_names_from_outside_are_text_not_markup(report: Report) -> None:
    page = render(replace(report, candidate="/tmp/<script>alert(1)</script>", reason='"><b>', notes=("a & <i>b",)))
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    Outline(page)


def test_equivalent_and_undecided(report: Report) -> None:
    same = render(replace(report, verdict="equivalent", diagnoses=[], layers=[], figures=None))
    assert "The candidate is the same function" in same and 'id="diagnosis"' not in same and 'id="layers"' not in same
    assert "It could not be decided" in render(replace(report, verdict="undecided"))


def test_what_is_not_finite_is_said(report: Report) -> None:
    layers = [replace(layer, own={**layer.own, "q": inf}) for layer in report.layers]
    assert report.figures is not None
    figures = replace(report.figures, kld_mean=nan, kld_mean_se=nan)
    page = render(replace(report, layers=layers, figures=figures))
    assert "∞" in page and "not finite" in page and "nan" not in page.lower().replace("finance", "")
    assert "∞" not in render(report)


def test_gradients_have_plots_where_they_were_compared(report: Report) -> None:
    gradients = {"input": 0.5, "self_attn.q_proj.lora_A": 0.25, "mlp.up_proj.lora_B": 0.125}
    layers = [replace(layer, gradients=gradients, gradient_noise=gradients) for layer in report.layers]
    descriptions = [t for tag, t in Outline(render(replace(report, layers=layers))).text if tag == "desc"]
    assert any(t.startswith("worst LoRA gradient over 5") and "own error from 0.25 to 0.25" in t for t in descriptions)
    assert any(t.startswith("gradient of the input") and "0.5" in t for t in descriptions)
    assert "gradient of the input" not in render(report)


GENERATIONS = {
    "prompts": 1234,
    "new_tokens": 64,
    "floor_of": "bfloat16 against float32",
    "candidate": {"same": 0.5, "agreeing": 0.875, "first": 7},
    "floor": {"same": 1.0, "agreeing": 1.0, "first": None},
    "texts": [{"prompt": 0, "agrees for": 7, "reference": "a <b> c", "candidate": "d"}],
}
SCORES = [{"task": "sums", "metric": "acc", "reference": 0.5, "candidate": 0.25, "difference": -0.25, "errors": None}]


def test_behaviour_is_told_in_words(report: Report) -> None:
    """The page is for readers: no key of the JSON is on it."""
    page = render(replace(report, generations=GENERATIONS, tasks={"scores": SCORES}))
    words = [text for _, text in Outline(page).text]
    assert {"What both answer", "same to the end", "50.0%", "87.5%", "a <b> c"} <= set(words)
    assert any("1,234 prompts, each continued greedily by at most 64 tokens" in text for text in words)
    assert {"Tasks", "sums", "in standard errors", "-0.25"} <= set(words)
    assert not {"new_tokens", "floor_of", "agrees for", "agreeing", "errors", "scores", "floor"} & set(words)
    assert "What both answer" not in render(report) and "Scores by lm-eval" not in render(report)


def test_continuations_that_all_agree_have_no_texts(report: Report) -> None:
    page = render(replace(report, generations=GENERATIONS | {"texts": []}))
    assert "What both answer" in page and "Those that part soonest" not in page


def test_written_whole_or_not_at_all(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_page(report, tmp_path / "nowhere" / "page.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_page(report, tmp_path)
    write_page(report, tmp_path / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


# Plots


def plot(*values: float | None) -> str:
    return line_plot("p", "errors", "all of them", range(len(values)), [Line(label="own", style="own", values=values)])


def heights(svg: str) -> list[float]:
    return [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]


def zero_line(svg: str) -> bool:
    """Whether the y axis has a line for 0."""
    return 'text-anchor="end">0</text>' in svg


def test_decades_are_evenly_spaced_and_zero_lies_below_all() -> None:
    ys = heights(plot(1e-4, 1e-3, 1e-2, 0.0))
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[3] > ys[0] > ys[2]
    assert zero_line(plot(1e-4, 0.0)) and not zero_line(plot(1e-4, 1e-3))


def test_what_is_missing_breaks_the_line() -> None:
    svg = plot(1.0, None, 2.0, 3.0)
    (path,) = re.findall(r'<path d="([^"]+)"', svg)
    assert path.count("M") == 2 and path.count("L") == 1
    assert len(heights(svg)) == 3


@pytest.mark.parametrize("values", [(0.0, 0.0), (inf, inf), (1e-3,), (5.0, 5.0)])
def test_degenerate_plots_stay_inside(values: tuple[float, ...]) -> None:
    assert all(0 <= y <= 220 for y in heights(plot(*values)))


def test_many_layers_get_few_labels() -> None:
    svg = plot(*[1e-3] * 80)
    assert svg.count('text-anchor="middle"') <= 9


# A real browser


def chromium(page: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What headless Chromium makes of a page: the DOM on stdout, complaints of the page on stderr."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    line += ["--enable-logging=stderr", "--disable-background-networking", "--dump-dom", file.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done


@contextmanager
def counting_server() -> Iterator[tuple[str, list[str]]]:
    """(address, paths that were asked for) of a server on this machine."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")


@needs_chromium
def test_in_a_browser(report: Report, tmp_path: Path) -> None:
    done = chromium(render(report, NORMS), tmp_path)
    assert "The candidate is another function" in done.stdout
    assert done.stdout.count('role="img"') == len(PARTS) + 3
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []


@needs_chromium
def test_the_browser_fetches_nothing_even_if_asked_to(report: Report, tmp_path: Path) -> None:
    """An image that somebody smuggles in is not fetched; in a page without our policy it is."""
    with counting_server() as (address, asked):
        page = render(report).replace("<main>", f'<main><img src="{address}/image" alt="">')
        done = chromium(page, tmp_path)
        assert asked == []
        assert any("Content Security Policy" in line for line in done.stderr.splitlines())
        chromium(re.sub(r"<meta http-equiv[^>]+>", "", page), tmp_path)
        assert "/image" in asked
