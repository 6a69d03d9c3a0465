"""OOD scores against negative labels: words that are far from every class. A higher score means in-distribution.

NegLabel (Jiang et al., ICLR 2024) mines WordNet's nouns and adjectives; CSP (Chen et al., NeurIPS 2024) puts adjectives
before words like "creature", and asks with several prompts. Both are here as their released code has them, but that a
word which is a class name is never its own negative, and that each prompt's feature is normalised before the mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipn.data.prompts import fill
from clipn.model.clipn import CLIPN
from clipn.model.head import Head
from clipn.runtime.files import atomic_write

# WordNet's lexicographer files by number; 02 and 29 .. 43 are adverbs and verbs (lexnames(5WN)).
_NOUN_FILES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
LEXICOGRAPHER_FILES = {0: "adj.all", 1: "adj.pert", 44: "adj.ppl"} | {
    number: f"noun.{name}" for number, name in enumerate(_NOUN_FILES.split(), start=3)
}

_SUPERCLASSES = ["environment", "space", "object", "scene", "place", "item", "area", "view", "thing", "pattern"]
_SUPERCLASSES += ["structure", "landscape", "vista", "creature"]


class Words(NamedTuple):
    """Candidates for negative labels, none of them twice: a word that is both is a noun."""

    nouns: list[str]
    adjectives: list[str]


class Pool(NamedTuple):
    """How candidates become texts: the prompts of classes and nouns, of adjectives, and what is left out."""

    noun_prompts: tuple[str, ...]
    adjective_prompts: tuple[str, ...]
    superclasses: tuple[str, ...] = ("{}",)  # one, drawn for each adjective, is filled with it
    left_out: tuple[str, ...] = ("noun.animal", "noun.food")  # lexicographer files
    too_near: float = float("inf")  # a candidate with a higher cosine to any class is not taken


NEGLABEL = Pool(("the nice {}",), ("This is a {} photo",))
CSP = Pool(
    (
        "a close-up photo of the nice {}.",
        "a photo with the nice {}.",
        "a good photo with the nice {}.",
        "a photo of the nice {}.",
        "{}",
        "the {}",
        "the good {}",
        "the nice {}",
    ),
    ("{}", "a nice photo of {}", "a good photo of {}", "a close-up photo of {}"),
    tuple(f"{{}} {name}" for name in _SUPERCLASSES),
    (*NEGLABEL.left_out, "noun.person", "noun.quantity", "noun.group", "adj.pert"),
    too_near=0.95,
)
POOLS = {"NegLabel": NEGLABEL, "CSP": CSP}


class Negatives(NamedTuple):
    """Mined negative labels, n in each of G groups, and the classes in the pool's prompts."""

    names: list[str]  # G * n of them, group after group
    weights: Tensor  # [G, n, D], L2-normalised
    labels: Tensor  # [C, D], L2-normalised


def read_words(path: str | Path, left_out: Sequence[str] = NEGLABEL.left_out) -> Words:
    """Candidate words from a file or folder of the user's; nothing is ever downloaded.

    path: WordNet's database folder (with data.noun, data.adj or both); a folder of lists named as its lexicographer
        files (noun.act.txt, adj.all.txt, ...; a word a line); or one list, whose lines are a word, taken for a noun,
        or "noun" or "adj", a tab and a word.
    left_out: the lexicographer files whose words are not taken, unless they stand in another one too.

    Raises FileNotFoundError for no such path, ValueError for what is not of these forms or holds no word.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such word list or WordNet folder")
    unknown = sorted(set(left_out) - set(LEXICOGRAPHER_FILES.values()))
    if unknown:
        raise ValueError(
            f"left_out: {', '.join(unknown)}: the lexicographer files are {', '.join(LEXICOGRAPHER_FILES.values())}"
        )
    try:
        found = list(_read(path, left_out))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    seen: set[str] = set()
    nouns = _unseen((word for kind, word in found if kind == "noun"), seen)
    adjectives = _unseen((word for kind, word in found if kind == "adj"), seen)
    if not nouns and not adjectives:
        raise ValueError(f"{path}: no words found; expected data.noun, data.adj, noun.*.txt, adj.*.txt or a list")
    return Words(nouns, adjectives)


@torch.no_grad()
def mine(
    model: CLIPN,
    tokenizer: Callable[[list[str]], Tensor],
    words: Words,
    class_names: Sequence[str],
    pool: Pool = NEGLABEL,
    share: float = 0.15,
    quantile: float = 0.95,
    groups: int = 100,
    seed: int = 0,
    batch_size: int = 512,
) -> Negatives:
    """The negative labels of these classes: a share of the nouns and the same share of the adjectives.

    Of each kind those are taken whose cosines to the classes have the lowest `quantile`. They are shuffled and split
    into groups of one size; the nearest of the adjectives that do not fill one are dropped (NegLabel, section 3).
    A class name is no candidate. Fewer negatives than groups are a group each.

    Raises ValueError for no class names, or when no candidate is left.
    """
    taken = {_key(name) for name in class_names}
    nouns = [word for word in words.nouns if _key(word) not in taken]
    draw = random.Random(seed)
    adjectives = [fill(draw.choice(pool.superclasses), word) for word in words.adjectives if _key(word) not in taken]
    if not class_names or not (nouns or adjectives):
        raise ValueError(f"negative labels: {len(class_names)} class names, {len(nouns + adjectives)} candidates")
    labels = _encode(model, tokenizer, list(class_names), pool.noun_prompts, batch_size)
    names, weights = [], []
    for candidates, prompts in ((nouns, pool.noun_prompts), (adjectives, pool.adjective_prompts)):
        if candidates:
            features = _encode(model, tokenizer, candidates, prompts, batch_size)
            chosen = _farthest(features, labels, share, quantile, pool.too_near)
            names += [candidates[i] for i in chosen.tolist()]
            weights.append(features[chosen])
    if not names:
        raise ValueError("negative labels: every candidate is too near to a class")
    groups = min(groups, len(names))
    kept = len(names) - len(names) % groups
    order = torch.randperm(kept, generator=torch.Generator().manual_seed(seed))
    grouped = torch.cat(weights)[order.to(labels.device)].unflatten(0, (groups, -1))
    return Negatives([names[i] for i in order.tolist()], grouped, labels)


def neglabel(image_features: Tensor, negatives: Negatives, scale: float = 100.0, block: int = 1024) -> Tensor:
    """[B, D] -> [B]: the softmax mass on the classes, mean over groups of negatives (NegLabel; CSP with its pool)."""
    features = image_features.to(negatives.labels.device)
    return torch.cat([_id_mass(part, negatives, scale) for part in features.split(block)])


def neglabel_clipn(
    image_features: Tensor, negatives: Negatives, head: Head, scale: float = 100.0, block: int = 1024
) -> Tensor:
    """[B, D] -> [B]: p_yes times the mass on each class, summed over classes, mean over groups of negatives.

    An ablation of this project, not published: CLIPN's ATD where the softmax has NegLabel's negatives too. p_yes is of
    the head's weights, the masses are of the negatives' own labels, in the same order of classes. Raises ValueError for
    negatives of another number of classes.
    """
    if len(head.weight_yes) != len(negatives.labels):
        raise ValueError(f"negatives of {len(negatives.labels)} classes, a head of {len(head.weight_yes)}")
    scores = []
    for part in image_features.to(negatives.labels.device).split(block):
        logits_yes, logits_no = head(part, scale)
        within = (scale * part @ negatives.labels.T).softmax(dim=1)
        agreed = (torch.sigmoid(logits_yes - logits_no) * within).sum(dim=1)
        scores.append(agreed * _id_mass(part, negatives, scale))
    return torch.cat(scores)


def save_negatives(negatives: Negatives, path: str | Path) -> None:
    """Write the mined labels as a table: the number of the group, a tab, the label."""
    size = negatives.weights.shape[1]
    lines = [f"{i // size}\t{name}\n" for i, name in enumerate(negatives.names)]
    with atomic_write(path) as stream:
        stream.write("".join(lines).encode())


def _id_mass(features: Tensor, negatives: Negatives, scale: float) -> Tensor:
    """[b, D] -> [b]. The mass on ID beside one group is the sigmoid of the difference of their log-sum-exps."""
    inside = (scale * features @ negatives.labels.T).logsumexp(dim=1, keepdim=True)
    outside = (scale * features @ negatives.weights.flatten(0, 1).T).unflatten(1, negatives.weights.shape[:2])
    return torch.sigmoid(inside - outside.logsumexp(dim=2)).mean(dim=1)


def _encode(
    model: CLIPN,
    tokenizer: Callable[[list[str]], Tensor],
    names: list[str],
    prompts: Sequence[str],
    batch_size: int,
) -> Tensor:
    """[len(names), D]: each name in all prompts, the mean of their features, normalised."""
    was_training = model.training
    model.eval()
    features = []
    for start in range(0, len(names), batch_size):
        part = names[start : start + batch_size]
        total = sum(model.encode_text(tokenizer([fill(prompt, name) for name in part])) for prompt in prompts)
        features.append(F.normalize(total, dim=-1))
    model.train(was_training)
    return torch.cat(features)


def _farthest(features: Tensor, labels: Tensor, share: float, quantile: float, too_near: float) -> Tensor:
    """The numbers of the candidates [N, D] to take, the farthest from the labels [C, D] first; at least one of them."""
    size = max(1, 2**23 // len(labels))  # torch.quantile takes no more than 2**24 numbers
    nearness = []
    for part in features.split(size):
        cosines = part @ labels.T
        value = cosines.quantile(quantile, dim=1)
        nearness.append(value.masked_fill(cosines.amax(dim=1) > too_near, float("inf")))
    ranked, order = torch.cat(nearness).sort(stable=True)
    count = min(max(1, int(len(features) * share)), int(ranked.isfinite().sum()))
    return order[:count]


def _read(path: Path, left_out: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(noun or adj, word) of any of the forms."""
    if path.is_file():
        for number, line in _lines(path):
            kind, tab, word = line.partition("\t")
            if tab and kind not in ("noun", "adj"):
                raise ValueError(f"{path}, line {number}: expected a word, or noun or adj, a tab and a word: {line!r}")
            yield (kind, word) if tab else ("noun", line)
        return
    for kind in ("noun", "adj"):
        if (path / f"data.{kind}").is_file():
            yield from ((kind, word) for word in _database_words(path / f"data.{kind}", left_out))
        for file in sorted(path.glob(f"{kind}*.txt")):
            if file.stem not in left_out:
                yield from ((kind, line) for _, line in _lines(file))


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as stream:
        yield from ((number, line.rstrip("\n")) for number, line in enumerate(stream, start=1) if line.strip())


def _database_words(path: Path, left_out: Sequence[str]) -> Iterable[str]:
    """The words of a WordNet data file (wndb(5WN)): offset, lexicographer file, kind, count, word, id, word, id, ..."""
    for number, line in _lines(path):
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" ")
        try:
            source, count = LEXICOGRAPHER_FILES[int(fields[1])], int(fields[3], 16)
            words = [fields[4 + 2 * i] for i in range(count)]
        except (IndexError, KeyError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not of WordNet's database form: {line[:60]!r}") from error
        if source not in left_out:
            yield from (word.split("(")[0] for word in words)  # galore(ip): where an adjective may stand


def _unseen(words: Iterable[str], seen: set[str]) -> list[str]:
    """The words that were not seen before, whatever their case, underscores as spaces."""
    found = []
    for word in words:
        if _key(word) and _key(word) not in seen:
            seen.add(_key(word))
            found.append(word.replace("_", " ").strip())
    return found


def _key(word: str) -> str:
    return word.replace("_", " ").strip().casefold()
