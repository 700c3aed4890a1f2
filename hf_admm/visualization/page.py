"""The page: HTML that needs nothing but itself."""

import base64
from collections.abc import Mapping
from html import escape

from hf_admm.version import __version__
from hf_admm.visualization.gathering import RunFigures
from hf_admm.visualization.sections import Picture, headline


# Nothing is loaded from anywhere, whatever stands in a name.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark;
  --ground: #f3f4f6; --card: #ffffff; --ink: #1b1f24; --muted: #4b5563; --line: #d3d7de }
@media (prefers-color-scheme: dark) {
  :root { --ground: #111418; --card: #1b1f24; --ink: #e8eaed; --muted: #aab2bd; --line: #3a414b }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 40px 0 12px }
h3 { font-size: 1rem; margin: 0 0 8px }
.muted, figcaption, dd.note { color: var(--muted) }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 165px), 1fr)); gap: 12px;
  margin: 20px 0 0 }
dl.facts > div, figure, details { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
dl.facts > div { padding: 12px 14px }
dt, dd.note { font-size: .85rem; line-height: 1.35 }
dd { margin: 0; overflow-wrap: anywhere }
dd.value { font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums }
.figures { columns: 2 420px; column-gap: 16px }
figure { margin: 0 0 16px; padding: 14px; break-inside: avoid }
figure img { display: block; width: 100%; max-width: 560px; height: auto; margin: 0 auto }
figcaption { font-size: .88rem; margin-top: 8px; overflow-wrap: anywhere }
details { margin-top: 16px; padding: 10px 14px }
summary { cursor: pointer }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; margin-top: 8px }
th, td { padding: 3px 14px 3px 0; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 1px solid var(--line) }
ul { padding-left: 1.2em; overflow-wrap: anywhere }
footer { margin-top: 40px; font-size: .85rem }
"""


def page(found: RunFigures, parts: Mapping[str, list[Picture]], images: Mapping[str, tuple[bytes, bytes]]) -> str:
    """
    Writes the page of a run.

    Args:
        found ([`RunFigures`]):
            What there is of the run.
        parts (`Mapping[str, list[Picture]]`):
            Its figures, by section.
        images (`Mapping[str, tuple[bytes, bytes]]`):
            The PNG of each figure, on a light and on a dark ground.

    Returns:
        `str`: The HTML.
    """
    model = found.results.get("model") or found.name
    title = f"{model}, sparse {found.pattern}" if found.pattern else str(model)
    body = [f"<h1>{_text(title)}</h1>"]
    if about := _about(found):
        body.append(f'<p class="muted">{_text(about)}</p>')
    facts = "".join(
        f'<div><dt>{_text(name)}</dt><dd class="value">{_text(value)}</dd><dd class="note">{_text(note)}</dd></div>'
        for name, value, note in headline(found)
    )
    if facts:
        body.append(f'<dl class="facts">{facts}</dl>')
    for heading, pictures in parts.items():
        figures = "\n".join(_figure(picture, *images[picture.name]) for picture in pictures)
        body.append(f'<section><h2>{_text(heading)}</h2><div class="figures">\n{figures}\n</div>')
        if heading == "Where the zeros are":
            body.append(_table(found))
        body.append("</section>")
    if found.missing:
        items = "".join(f"<li>{_text(f'{what}: {why}.')}</li>" for what, why in found.missing.items())
        body.append(f"<section><h2>Left out</h2><ul>{items}</ul></section>")
    body.append(f'<footer class="muted">Written by hf_admm {_text(__version__)}.</footer>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _about(found: RunFigures) -> str:
    results, words = found.results, []
    if "task" in results:
        words.append(f"task {results['task']}")
    if results.get("steps"):
        words.append(f"{results['steps']} steps")
    elif found.logs is not None and found.logs.last_step:
        words.append(f"{found.logs.last_step} steps")
    if "seed" in results:
        words.append(f"seed {results['seed']}")
    seconds = results.get("seconds") or {}
    words += [f"{kind} {seconds[kind]:.0f} s" for kind in ("dense", "sparse") if seconds.get(kind)]
    return ", ".join(words)


def _figure(picture: Picture, light: bytes, dark: bytes) -> str:
    width, height = (int.from_bytes(light[place : place + 4], "big") for place in (16, 20))  # of the PNG's header
    return (
        f'<figure id="{_text(picture.name)}"><h3>{_text(picture.title)}</h3><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" width="{width // 2}" height="{height // 2}" alt="{_text(picture.alt)}"></picture>'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _table(found: RunFigures) -> str:
    """Every weight, for those who want the number or do not see the figures."""
    rows = []
    for layer in found.weights.layers:
        audit = layer.audit
        lost = "-" if layer.lost is None else f"{100 * layer.lost:.2f} %"
        groups = f"{audit.broken} of {audit.groups}" if audit.sparse else "-"
        shape = "x".join(map(str, audit.shape)) or "-"
        cells = (audit.name, shape, f"{100 * layer.sparsity:.2f} %", lost, groups, audit.status)
        rows.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    titles = ("weight", "shape", "zeros", "magnitude lost", "broken groups", "status")
    header = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        f'<details><summary>All {len(rows)} weights</summary><div class="scroll" tabindex="0"><table><thead><tr>'
        f"{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _text(value: object) -> str:
    return escape(str(value))
