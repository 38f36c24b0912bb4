"""The report as one HTML file that can be read offline, mailed and printed: the verdict in words, then why.

No script and no resource from elsewhere; the page's own Content-Security-Policy forbids both. Everything that is drawn
is also a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from qwen2tool.console import format_number
from qwen2tool.errors import UserError
from qwen2tool.verify.inventory import in_words
from qwen2tool.verify.layer_figures import PARTS, LayerFigures
from qwen2tool.verify.norms import BiasNorms, norms_by_name
from qwen2tool.verify.page_style import STYLE
from qwen2tool.verify.plots import Line, line_plot
from qwen2tool.verify.report import Report
from qwen2tool.verify.statistics import LogitFigures, format_ratio

VERDICTS = {
    "equivalent": "The candidate is the same function",
    "different": "The candidate is another function",
    "undecided": "It could not be decided",
}
NAMES = {
    "q": "q projection", "k": "k projection", "v": "v projection", "attention": "attention", "mlp": "MLP",
    "output": "layer output",
}  # fmt: skip
LISTED = 40
"""Rows of the table of tensors."""


def write_page(report: Report, path: Path) -> None:
    """Writes `report` to `path`, whole or not at all; reads the biases of both sides once more for their plot.

    Raises:
        UserError: `path` is a folder, or lies in a folder that does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written", "Name a file in a folder that exists")
    unfinished = path.with_name(f".{path.name}.tmp")
    page = render(report, norms_by_name(report.reference, report.candidate))
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)


def render(report: Report, norms: BiasNorms | None = None) -> str:
    """The page as text; without `norms` it has no plot of the biases."""
    body = [
        *_head(report),
        *_diagnosis(report),
        *_figures(report),
        *_layers(report.layers, report.dtype),
        *_biases(norms or {}),
        *_tensors(report),
        *_files(report),
        *_generations(report.generations),
        *_tasks(report.tasks),
        *_environment(report),
    ]
    title = f"{report.verdict}: {Path(report.candidate).name} against {Path(report.reference).name}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _head(report: Report) -> Iterator[str]:
    yield f'<header class="verdict {report.verdict}">'
    yield f'<p class="word">{report.verdict}</p>'
    yield f"<h1>{escape(VERDICTS[report.verdict])}</h1>"
    yield f"<p>{escape(_sentence(report.reason))}</p>"
    yield "</header>"
    adapters = " + ".join(["", *report.adapters])
    on = f", on its {report.adapter_on} base" if report.adapters and report.adapter_on else ""
    yield '<dl class="sides">'
    yield f"<dt>Reference</dt><dd>{escape(report.reference + adapters + on)} ({escape(report.kinds[0])})</dd>"
    yield f"<dt>Candidate</dt><dd>{escape(report.candidate)} ({escape(report.kinds[1])})</dd>"
    yield "</dl>"


def _sentence(text: str) -> str:
    """A capital letter and a full stop; names of files and tensors keep their letters."""
    first = text.split()[0] if text else ""
    return f"{text[:1].upper() if first.isalpha() else text[:1]}{text[1:]}." if text else ""


def _diagnosis(report: Report) -> Iterator[str]:
    if report.diagnoses:
        yield '<section id="diagnosis"><h2>Diagnosis</h2><ol>'
        for diagnosis in report.diagnoses:
            yield f"<li>{escape(diagnosis.sentence)} <code>{escape(diagnosis.code)}</code></li>"
        yield "</ol></section>"
    if report.first_beyond is not None:
        beyond = report.first_beyond
        part = NAMES.get(beyond.part, beyond.part)
        yield (
            f"<p>On the same input, the first that the reference's own noise cannot explain is the {escape(part)} of "
            f"layer {beyond.layer}: its error is {_number(beyond.error)}, the noise {_number(beyond.noise)}.</p>"
        )


def _figures(report: Report) -> Iterator[str]:
    if report.figures is None:
        return
    yield '<section id="figures"><h2>What both predict</h2>'
    ppl = _number(report.figures.ppl_reference)
    yield f"<p>{report.figures.tokens:,} scored tokens; perplexity of the reference {ppl}.</p>"
    columns = (
        "",
        "mean KLD",
        "median",
        "99 %",
        "max",
        "same top-1",
        "same top-5",
        "NLL difference",
        "PPL",
        "PPL ratio",
    )
    rows = [_row(f"noise: {name}", floor) for name, floor in report.floors.items()]
    yield _table(
        "Divergence of the predicted distributions, in nats", columns, [*rows, _row("candidate", report.figures)]
    )
    yield "</section>"


def _row(label: str, figures: LogitFigures) -> tuple[object, ...]:
    ratio = format_ratio(figures.ppl_ratio, figures.ppl_ratio_se)
    mean = _with_error(figures.kld_mean, figures.kld_mean_se)
    top, top5 = f"{figures.same_top:.2%}", f"{figures.same_top5:.2%}"
    nll = _with_error(figures.nll_difference, figures.nll_difference_se)
    klds = (figures.kld_median, figures.kld_99, figures.kld_max)
    return label, mean, *klds, top, top5, nll, figures.ppl_candidate, ratio


def _with_error(value: float, error: float) -> str:
    return f"{_number(value)} ± {error:.1e}" if isfinite(error) else _number(value)


def _layers(layers: Sequence[LayerFigures], dtype: str) -> Iterator[str]:
    if not layers:
        return
    yield '<section id="layers"><h2>Layer by layer</h2>'
    yield (
        "<p>Relative error against the reference in float32. <em>Own</em>: on the reference's hidden states, so the "
        "layer's own fault. <em>Accumulated</em>: on what the layers before made of the text. Noise: the reference "
        f"itself in {escape(dtype)}.</p>"
    )
    styles = (
        ("own error", "own"),
        ("accumulated error", "accumulated"),
        ("own noise", "own-noise"),
        ("noise", "noise"),
    )
    yield _legend(styles)
    yield '<div class="plots">'
    for part in [part for part in PARTS if any(part in layer.own or part in layer.accumulated for layer in layers)]:
        columns = [[_of_layer(layer, part)[n] for layer in layers] for n in range(len(styles))]
        lines = [Line(label=s[0], style=s[1], values=column) for s, column in zip(styles, columns, strict=True)]
        yield _figure(f"layer-{part}", NAMES.get(part, part), [layer.index for layer in layers], lines)
    yield from _gradients(layers)
    yield "</div></section>"


def _gradients(layers: Sequence[LayerFigures]) -> Iterator[str]:
    """Errors of gradients on the reference's hidden states: of the layer's input, and the worst of LoRA's."""
    if not any(layer.gradients for layer in layers):
        return
    for name, title, of_input in (("input", "gradient of the input", True), ("lora", "worst LoRA gradient", False)):
        columns = [
            [max((e for key, e in errors.items() if (key == "input") == of_input), default=None) for errors in side]
            for side in ([layer.gradients for layer in layers], [layer.gradient_noise for layer in layers])
        ]
        styles = (("own error", "own"), ("own noise", "own-noise"))
        lines = [Line(label=s[0], style=s[1], values=column) for s, column in zip(styles, columns, strict=True)]
        yield _figure(f"gradient-{name}", title, [layer.index for layer in layers], lines)


def _of_layer(layer: LayerFigures, part: str) -> tuple[float | None, float | None, float | None, float | None]:
    runs = [errors[part] for errors in layer.noise.values() if part in errors]
    noise = max(runs, default=None)
    return layer.own.get(part), layer.accumulated.get(part), layer.own_noise.get(part), noise


def _biases(norms: BiasNorms) -> Iterator[str]:
    if not norms:
        return
    yield '<section id="biases"><h2>Biases</h2><p>Norm of each q, k and v bias on both sides.</p>'
    yield _legend((("reference", "reference"), ("candidate", "own")))
    yield '<div class="plots">'
    for projection, pairs in norms.items():
        lines = [
            Line(label="reference", style="reference", values=[pair[0] for pair in pairs]),
            Line(label="candidate", style="own", values=[pair[1] for pair in pairs]),
        ]
        yield _figure(f"bias-{projection}", f"norm of the {projection} bias", range(len(pairs)), lines)
    yield "</div></section>"


def _figure(name: str, title: str, layers: Sequence[int], lines: Sequence[Line]) -> str:
    """A plot, and beneath it the same numbers as a table."""
    shown = [line for line in lines if any(value is not None for value in line.values)]
    plot = line_plot(name, title, _describe(title, layers, shown), layers, shown)
    rows = [(layer, *(line.values[n] for line in shown)) for n, layer in enumerate(layers)]
    table = _table(title, ("layer", *(line.label for line in shown)), rows, hidden_caption=True)
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f"<figure>{caption}{plot}<details><summary>Numbers</summary>{table}</details></figure>"


def _describe(title: str, layers: Sequence[int], lines: Sequence[Line]) -> str:
    """What a reader who cannot see the plot has to know: the range of each line and its largest value's layer."""
    parts = []
    for line in lines:
        known = [(value, layer) for value, layer in zip(line.values, layers, strict=True) if value is not None]
        largest, where = max(known, key=lambda pair: pair[0])
        parts.append(f"{line.label} from {_number(min(known)[0])} to {_number(largest)} (layer {where})")
    return f"{title} over {len(layers)} layers, logarithmic: {'; '.join(parts)}."


def _legend(styles: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><g class="series {style}"><path d="M0 5 L30 5"/>'
        f'<circle cx="15" cy="5" r="2.2"/></g></svg>{escape(label)}</li>'
        for label, style in styles
    )
    return f'<ul class="legend">{items}</ul>'


def _tensors(report: Report) -> Iterator[str]:
    yield '<section id="tensors"><h2>Tensors</h2>'
    counts = {kind: sum(t.kind == kind for t in report.tensors) for kind in ("identical", "one rounding", "different")}
    yield f"<p>{', '.join(f'{count:,} {kind}' for kind, count in counts.items())}.</p>"
    if report.worst:
        rows = [(t.name, t.max_abs, t.relative_error, None if t.zeroed else t.cosine) for t in report.worst[:LISTED]]
        of = f", {len(rows)} of {len(report.worst)}" if len(rows) < len(report.worst) else ""
        yield _table(f"Those that differ most{of}", ("tensor", "max abs", "relative error", "cosine"), rows)
    yield "</section>"


def _files(report: Report) -> Iterator[str]:
    found = report.inventory
    yield '<section id="files"><h2>Files</h2>'
    yield (
        f"<p>{found.candidate_biases} biases in the candidate, {found.reference_biases} in the reference; "
        f"{len(found.missing)} tensors missing, {len(found.extra)} extra, {len(found.misshapen)} of another shape.</p>"
    )
    if found.renamed:
        yield f"<p>Of these, {len(found.renamed)} are there under another name.</p>"
    for words, names in (("Missing", found.missing), ("Extra", found.extra), ("Of another shape", found.misshapen)):
        if names:
            yield f"<details><summary>{words}</summary><p>{escape(', '.join(names))}</p></details>"
    if found.config:
        rows = [(name, in_words(mine), in_words(theirs)) for name, (mine, theirs) in found.config.items()]
        yield _table("config.json", ("field", "reference", "candidate"), rows)
    yield "</section>"


def _generations(found: Mapping[str, Any] | None) -> Iterator[str]:
    """How far the greedy continuations go together, and the texts that part soonest."""
    if not found:
        return
    yield '<section id="generations"><h2>What both answer</h2>'
    yield (
        f"<p>{found['prompts']:,} prompts, each continued greedily by at most {found['new_tokens']:,} tokens, and held "
        f"against the reference in float32. Noise: the reference itself, {escape(found['floor_of'])}.</p>"
    )
    columns = ("", "same to the end", "tokens before a difference", "soonest difference, at token")
    rows = [
        (label, f"{part['same']:.1%}", f"{part['agreeing']:.1%}", part["first"])
        for label, part in (("noise", found["floor"]), ("candidate", found["candidate"]))
    ]
    yield _table("Greedy continuations", columns, rows)
    if found["texts"]:
        texts = [(t["prompt"], t["agrees for"], t["reference"], t["candidate"]) for t in found["texts"]]
        yield _table("Those that part soonest", ("prompt", "same tokens", "the reference", "the candidate"), texts)
    yield "</section>"


def _tasks(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Scores of lm-eval on both sides."""
    if not found:
        return
    yield '<section id="tasks"><h2>Tasks</h2>'
    columns = ("task", "metric", "reference", "candidate", "difference", "in standard errors")
    keys = ("task", "metric", "reference", "candidate", "difference", "errors")
    yield _table("Scores by lm-eval", columns, [[score[key] for key in keys] for score in found["scores"]])
    yield "</section>"


def _environment(report: Report) -> Iterator[str]:
    yield '<footer id="environment"><h2>How this was measured</h2>'
    for note in report.notes:
        yield f"<p>{escape(_sentence(note))}</p>"
    if report.tolerance is not None:
        yield f"<p>Allowed by hand instead of the noise: a mean KLD of {_number(report.tolerance)}.</p>"
    parts = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    yield f"<p>{escape(parts)}; meant to run in {escape(report.dtype)}; {report.seconds:,.0f} s.</p></footer>"


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], hidden_caption: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(_cell(value))}</td>" for value in others)
        lines.append(f'<tr><th scope="row">{escape(_cell(first))}</th>{cells}</tr>')
    hidden = ' class="hidden"' if hidden_caption else ""
    label = escape(caption or "values")
    title = f"<caption{hidden}>{escape(caption)}</caption>" if caption else ""
    body = f"{title}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{body}</table></div>'


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return format_number(value) if isfinite(value) else "not finite"
