"""report.html: one page that holds everything it shows, with a gallery of a score's worst mistakes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from clipn.data.images import open_image
from clipn.runtime.console import printable

if TYPE_CHECKING:
    from clipn.evaluation.results import SetScores

_WORST = 12  # pictures of each set in the gallery
_THUMBNAIL = 160  # pixels
_LARGEST_PNG = 1_000_000  # bytes: only photos need more
_GALLERY = (
    "A high score means ID. Under each picture: its own class if known, the class it is taken for, its score, and the "
    'probabilities of "yes" and "no" for the class it is taken for.'
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --quiet: #5b6470; --line: #d8dde3; --paper: #fff; --card: #f5f7f9;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --quiet: #a3adb8; --line: #3a424b; --paper: #14171a;
  --card: #1f2429; --link: #7db8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; } p { max-width: 46rem; margin: .4rem 0; }
a { color: var(--link); } small, .quiet, figcaption { color: var(--quiet); }
nav a { margin-right: 1rem; white-space: nowrap; }
.wide { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
thead th { font-weight: 600; } thead tr:last-child > * { border-bottom: 1px solid var(--line); }
tbody tr:hover > * { background: var(--card); } th[colspan] { text-align: center; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
figure { margin: 1.5rem 0; } figure img { display: block; background: #fff; border-radius: .4rem; max-width: 100%;
  min-width: 46rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; padding: 0;
  list-style: none; }
.gallery li { background: var(--card); border-radius: .4rem; padding: .5rem; font-size: .8rem; line-height: 1.35; }
.gallery img { display: block; width: 100%; height: 8.5rem; object-fit: contain; margin-bottom: .35rem; }
sub { line-height: 0; } .pixels { image-rendering: pixelated; }
.published { border-left: .25rem solid var(--line); padding-left: 1rem; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<nav>{links}</nav>
{sections}
</body>
</html>
"""


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole page. sections: heading (text) and content (HTML); one without content is left out."""
    named = [(f"part-{number}", html.escape(head), body) for number, (head, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#{key}">{head}</a>\n' for key, head, _ in named)
    parts = "\n".join(f'<section id="{key}"><h2>{head}</h2>\n{body}\n</section>' for key, head, body in named)
    return _PAGE.format(title=html.escape(title), style=_STYLE, links=links, sections=parts)


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>" if text else ""


def link(url: str) -> str:
    """A link that shows its address."""
    return f'<a href="{html.escape(url)}" rel="noreferrer">{html.escape(url)}</a>'


def figure(path: Path, caption: str) -> str:
    """A picture file as a figure, of photos as a JPEG; a screen narrower than its text needs scrolls it sideways."""
    content, kind = path.read_bytes(), "png"
    if len(content) > _LARGEST_PNG:
        content, kind = _encoded(open_image(path), "jpeg"), "jpeg"
    source, caption = _data_uri(content, kind), html.escape(caption)
    image = f'<div class="wide" tabindex="0"><img src="{source}" alt="{caption}"></div>'
    return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"


def gallery(found: dict[str, SetScores], results: pd.DataFrame, class_names: Sequence[str], method: str) -> str:
    """A score's worst mistakes: each OOD set's images most sure to be ID, and the ID images most sure to be OOD.

    found: the ID set first. results: says how many OOD images pass where 95 % of ID do, for the first checkpoint.
    """
    inside, *outside = found.values()
    parts = [paragraph(_GALLERY)]
    for one in outside:
        rows = results[(results["ood_set"] == one.images.name) & (results["method"] == method)]
        share = f"{100 * rows['FPR95'].iloc[0]:.2f} % of its {len(one.images)} images pass where 95 % of the ID do."
        worst = np.argsort(-one.scores[method], kind="stable")[:_WORST]
        parts.append(f"<h3>{html.escape(one.images.name)} (OOD): most sure to be ID</h3>{paragraph(share)}")
        parts.append(_cards(one, worst, method, class_names, is_id=False))
    worst = np.argsort(inside.scores[method], kind="stable")[:_WORST]
    parts.append(f"<h3>{html.escape(inside.images.name)} (ID): most sure to be OOD</h3>")
    parts.append(_cards(inside, worst, method, class_names, is_id=True))
    return "\n".join(parts)


def _cards(one: SetScores, chosen: Sequence[int], method: str, class_names: Sequence[str], is_id: bool) -> str:
    own_names = class_names if is_id else [folder.replace("_", " ") for folder in one.images.classes]
    cards = []
    for index in chosen:
        label = one.images.labels[index] if one.images.labels else None
        guess, p_yes, path = int(one.predicted[index]), one.p_yes[index], one.images.paths[index]
        lines = [] if label is None else [f"<b>{html.escape(own_names[label])}</b>"]
        right = is_id and guess == label
        lines.append("class right" if right else f"taken for <b>{html.escape(class_names[guess])}</b>")
        lines.append(f"{html.escape(method)} {one.scores[method][index]:#.4g}")
        lines.append(f"p<sub>yes</sub> {p_yes:.3f}, p<sub>no</sub> {1 - p_yes:.3f}")
        picture = thumbnail(path, printable(path.name) if label is None else own_names[label])
        cards.append(f'<li title="{html.escape(printable(path.name))}">{picture}{"<br>".join(lines)}</li>')
    return f'<ul class="gallery">{"".join(cards)}</ul>'


def thumbnail(path: Path, text: str, pixels: int = _THUMBNAIL) -> str:
    """A picture file, made small, as an image of the page; a tiny one keeps its pixels. `text`: for who cannot see."""
    image = open_image(path)
    tiny = max(image.size) <= pixels // 2
    image.thumbnail((pixels, pixels))
    kind, style = ("png", ' class="pixels"') if tiny else ("jpeg", "")
    return f'<img src="{_data_uri(_encoded(image, kind), kind)}" alt="{html.escape(text)}"{style}>'


def _encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, quality=80)
    return stream.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
