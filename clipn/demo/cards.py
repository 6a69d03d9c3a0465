"""What the page of `clipn demo` shows, as HTML: a card for each picture, and pictures to choose from."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path

from clipn.deploy.result import Result
from clipn.report.html import thumbnail

_MOST_CLASSES = 8  # of a card
_THUMBNAIL = 240  # pixels

STYLE = """
:root { --yes: #2b6cb0; --no: #d97b29; --likely: #6b7785; --quiet: #5b6470; }
.dark { --yes: #63a4e8; --no: #e8964f; --likely: #98a3b0; --quiet: #a3adb8; }
.clipn { color: var(--body-text-color); font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere; }
.clipn p { margin: 0 0 .5rem; max-width: 48rem; }
.clipn h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 .4rem; }
.clipn h2 { font-size: 1.2rem; font-weight: 600; line-height: 1.25; margin: 0 0 .3rem; }
.clipn section h2 { font-size: 1rem; margin: .9rem 0 .4rem; }
.clipn .note { border-left: .25rem solid var(--no); padding-left: .7rem; }
.clipn .quiet { color: var(--quiet); font-size: .8rem; }
.clipn .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .8rem;
  align-items: start; }
.clipn article { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  border-left: .3rem solid var(--likely); border-radius: .4rem; padding: .8rem; }
.clipn article.known { border-left-color: var(--yes); } .clipn article.none { border-left-color: var(--no); }
.clipn .head { display: flex; gap: .8rem; margin-bottom: .5rem; }
.clipn .head img { width: 6.5rem; height: 6.5rem; flex: none; object-fit: contain; }
.clipn .head p { margin-bottom: .2rem; } .clipn .pixels { image-rendering: pixelated; }
.clipn table { width: 100%; border-collapse: collapse; table-layout: fixed; font-size: .8rem; }
.clipn table, .clipn dl { font-variant-numeric: tabular-nums; }
.clipn th, .clipn td { text-align: left; font-weight: 400; padding: .2rem .6rem .2rem 0; vertical-align: top; }
.clipn :is(th, td):last-child { padding-right: 0; } .clipn th:first-child { width: 31%; }
.clipn th:nth-child(2) { width: 29%; } .clipn thead { color: var(--quiet); }
.clipn thead th { border-bottom: 1px solid var(--border-color-primary); font-size: .75rem; }
.clipn .unknown > * { border-top: 1px solid var(--border-color-primary); }
.clipn .bar { display: flex; height: .4rem; margin: .2rem 0 .1rem; border-radius: .2rem; overflow: hidden;
  background: var(--border-color-primary); }
.clipn .likely { background: var(--likely); } .clipn .yes { background: var(--yes); }
.clipn .no { background: var(--no); } .clipn .ends { display: flex; justify-content: space-between; }
.clipn dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); column-gap: 1.2rem;
  font-size: .8rem; margin: 0; }
.clipn .scores { margin: .5rem 0 .2rem; padding-top: .4rem; border-top: 1px solid var(--border-color-primary); }
.clipn dl div { display: flex; justify-content: space-between; } .clipn dl .chosen { font-weight: 600; }
.clipn dt, .clipn dd { margin: 0; }
.clipn ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.4rem, 1fr)); gap: .5rem; list-style: none;
  margin: 0; padding: 0; }
.clipn li { margin: 0; }
.clipn li button { display: flex; flex-direction: column; align-items: center; width: 100%; height: 100%;
  padding: .3rem; border: 1px solid var(--border-color-primary); border-radius: .4rem;
  background: var(--background-fill-secondary); cursor: pointer; font-size: .75rem; line-height: 1.3; }
.clipn li button:hover { border-color: var(--yes); } .clipn li button:focus-visible { outline: 2px solid var(--yes); }
.clipn li button[aria-pressed=true] { outline: 2px solid var(--yes); }
.clipn li img { width: 100%; aspect-ratio: 1; object-fit: contain; margin: 0 0 .3rem; }
.html-container:has(.clipn) { padding: .3rem 0; }
#example-verdict { position: sticky; top: 1rem; }
"""


def heading(title: str, text: str, note: str = "") -> str:
    """The page's title, what it is for, and a note if there is one."""
    noted = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<div class="clipn"><h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>{noted}</div>'


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f'<div class="clipn"><p>{html.escape(text)}</p></div>'


def cards(pictures: Sequence[tuple[str, Path]], found: Sequence[Result | Exception]) -> str:
    """A card for each picture, given by its name and its file, and before them how many are what."""
    parts = [
        _error(name, path, one) if isinstance(one, Exception) else _card(name, path, one)
        for (name, path), one in zip(pictures, found, strict=True)
    ]
    return f'<div class="clipn"><p role="status">{_summary(found)}</p><div class="cards">{"".join(parts)}</div></div>'


def choices(groups: dict[str, list[tuple[str, Path]]]) -> str:
    """The pictures under their titles as buttons, numbered through."""
    numbers, parts = count(), []
    for title, pictures in groups.items():
        buttons = "".join(_button(next(numbers), name, path) for name, path in pictures)
        parts.append(f"<section><h2>{html.escape(title)}</h2><ul>{buttons}</ul></section>")
    return f'<div class="clipn">{"".join(parts)}</div>'


def parse_class_names(text: str) -> list[str]:
    """The names in the box: one a line or separated by commas, each once."""
    return list(dict.fromkeys(" ".join(name.split()) for name in re.split(r"[,\n]", text or "") if name.strip()))


def verdict(result: Result) -> tuple[str, str]:
    """The verdict in plain words, and why it is so."""
    if result.says_ood is None:
        return f"most like: {result.label}", f"{result.method} gives a score, not a verdict; ATD and CTW decide."
    said = f"none of these (nearest: {result.label})" if result.says_ood else result.label
    return said, _why(result)


def _why(result: Result) -> str:
    if result.method == "CTW":
        wins = "“no” wins over “yes”" if result.says_ood else "“yes” wins over “no”"
        larger, smaller = sorted((result.p_yes, result.p_no), reverse=True)
        return f"For the likeliest class, {result.label}, {wins}: {_percent(larger)} to {_percent(smaller)}."
    best = max(result.top(len(result.class_names)), key=lambda one: one.probability * one.p_yes)
    kept, unknown = _percent(best.probability * best.p_yes), f"“unknown” has {_percent(1 - result.scores['ATD'])}"
    product = f"{_percent(best.probability)} × yes {_percent(best.p_yes)}"
    if result.says_ood:
        return f"{unknown}; no class keeps more than {kept} ({best.label}: {product})."
    return f"{best.label} keeps {kept} ({product}); {unknown}."


def _summary(found: Sequence[Result | Exception]) -> str:
    judged = [one.says_ood for one in found if isinstance(one, Result)]
    counts = {
        "of your classes": judged.count(False),
        "none of them": judged.count(True),
        "without a verdict": judged.count(None),
        "not readable": len(found) - len(judged),
    }
    pictures = "1 picture" if len(found) == 1 else f"{len(found)} pictures"
    return f"{pictures}: {', '.join(f'{number} {what}' for what, number in counts.items() if number)}"


def _card(name: str, path: Path, result: Result) -> str:
    said, why = verdict(result)
    kind = {None: "score", False: "known", True: "none"}[result.says_ood]
    rows = [
        _row(
            one.label,
            one.probability,
            _bar(("yes", one.p_yes), ("no", one.p_no)) + _ends(_percent(one.p_yes), _percent(one.p_no)),
        )
        for one in result.top(_MOST_CLASSES)
    ]
    left = len(result.class_names) - len(rows)
    if left > 0:
        rows.append(f'<tr><td colspan="3" class="quiet">and {left} less likely</td></tr>')
    if result.method == "ATD":
        rows.append(_row("unknown", 1 - result.scores["ATD"], "", "unknown"))
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("class", "probability", _ends("yes", "no")))
    return (
        f'<article class="{kind}"><div class="head">{_picture(path)}<div><h2>{html.escape(said)}</h2>'
        f'<p>{html.escape(why)}</p><p class="quiet">{html.escape(name)}</p></div></div>'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{_scores(result)}</article>"
    )


def _row(label: str, probability: float, rest: str, kind: str = "") -> str:
    bar = _bar(("likely", probability))
    return (
        f'<tr class="{kind}"><th scope="row">{html.escape(label)}</th>'
        f"<td>{bar}{_percent(probability)}</td><td>{rest}</td></tr>"
    )


def _bar(*parts: tuple[str, float]) -> str:
    spans = "".join(f'<span class="{kind}" style="width: {100 * share:.2f}%"></span>' for kind, share in parts)
    return f'<span class="bar" aria-hidden="true">{spans}</span>'


def _ends(left: str, right: str) -> str:
    return f'<span class="ends"><span>{left}</span><span>{right}</span></span>'


def _scores(result: Result) -> str:
    """All scores. A list of pairs, not a table, so that it has as many columns as there is room for."""
    items = [
        f"<div{' class=chosen' if method == result.method else ''}><dt>{method}</dt><dd>{score:.4g}</dd></div>"
        for method, score in result.scores.items()
    ]
    return f'<p class="quiet scores">scores; higher: in-distribution</p><dl>{"".join(items)}</dl>'


def _error(name: str, path: Path, error: Exception) -> str:
    reason = str(error).replace(f"{path}: ", "")  # the browser's file lies in a folder that means nothing to anybody
    words = f'<p>{html.escape(reason)}</p><p class="quiet">{html.escape(name)}</p>'
    return f"<article><h2>not readable</h2>{words}</article>"


def _button(number: int, name: str, path: Path) -> str:
    return f'<li><button type="button" data-number="{number}">{_picture(path)}{html.escape(name)}</button></li>'


@lru_cache(maxsize=512)  # the pictures stay while the classes change
def _picture(path: Path) -> str:
    """The picture, small, for beside its name."""
    return thumbnail(path, "", _THUMBNAIL)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
