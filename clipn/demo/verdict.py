"""The text of the demo page about each image, without any user interface."""

import re
from collections.abc import Sequence

from clipn.deploy.result import Result

UNKNOWN = "“unknown”"  # in quotes, so that it differs from a class of this name


def parse_class_names(text: str) -> list[str]:
    """The class names of a text box: one per line or separated by commas, without duplicates."""
    return list(dict.fromkeys(" ".join(name.split()) for name in re.split(r"[,\n]", text or "") if name.strip()))


def verdict(result: Result) -> tuple[str, str]:
    """The verdict in plain words, and one sentence that gives the reason."""
    if result.says_ood is None:
        return f"most like: {result.label}", f"{result.method} gives a score, not a verdict; ATD and CTW decide."
    title = f"none of these (nearest: {result.label})" if result.says_ood else result.label
    if result.method == "CTW":
        wins = "“no” wins over “yes”" if result.says_ood else "“yes” wins over “no”"
        larger, smaller = sorted((result.p_yes, result.p_no), reverse=True)
        return title, f"For the likeliest class, {result.label}, {wins}: {larger:.1%} to {smaller:.1%}."
    if result.method != "ATD":
        side = "below" if result.says_ood else "at or above"
        return title, f"{result.method} is {result.score:.4g}, {side} the threshold that was set on known images."
    best = max(result.top(len(result.class_names)), key=lambda entry: entry.probability * entry.p_yes)
    kept, unknown = f"{best.probability * best.p_yes:.1%}", f"{UNKNOWN} has {1 - result.scores['ATD']:.1%}"
    product = f"{best.probability:.1%} × yes {best.p_yes:.1%}"
    if result.says_ood:
        return title, f"{unknown}; no class keeps more than {kept} ({best.label}: {product})."
    return title, f"{best.label} keeps {kept} ({product}); {unknown}."


def class_shares(result: Result, k: int) -> dict[str, float]:
    """The k largest class probabilities. For ATD each is multiplied by p_yes, and "unknown" has the rest."""
    classes = result.top(len(result.class_names))
    if result.method != "ATD":
        return {entry.label: entry.probability for entry in classes[:k]}
    kept = {entry.label: entry.probability * entry.p_yes for entry in classes}
    largest = sorted(kept, key=kept.get, reverse=True)[:k]
    return {label: kept[label] for label in largest} | {UNKNOWN: 1 - result.scores["ATD"]}


def summary(results: Sequence[Result | Exception]) -> str:
    """How many images there are of each kind of verdict."""
    decisions = [result.says_ood for result in results if isinstance(result, Result)]
    counts = {
        "of your classes": decisions.count(False),
        "none of them": decisions.count(True),
        "without a verdict": decisions.count(None),
        "not readable": len(results) - len(decisions),
    }
    images = "1 image" if len(results) == 1 else f"{len(results)} images"
    return f"{images}: {', '.join(f'{count} {kind}' for kind, count in counts.items() if count)}"
