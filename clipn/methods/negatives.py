"""OOD scores against negative labels: words that are far from every class. A higher score means in-distribution.

NegLabel (Jiang et al., ICLR 2024) mines the nouns and adjectives of WordNet. CSP (Chen et al., NeurIPS 2024) puts
adjectives before words like "creature", and uses several prompts. Both follow their released code, with two
exceptions: a class name is never a negative, and each prompt's feature is normalised before the mean.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipn.data.prompts import fill
from clipn.model.clipn import CLIPN
from clipn.model.head import Head, class_weights
from clipn.runtime.files import atomic_write
from clipn.scores import mean_log_odds

# WordNet's lexicographer files by number; 02 and 29 .. 43 are adverbs and verbs (lexnames(5WN)).
_NOUN_FILES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
LEXICOGRAPHER_FILES = {0: "adj.all", 1: "adj.pert", 44: "adj.ppl"} | {
    number: f"noun.{name}" for number, name in enumerate(_NOUN_FILES.split(), start=3)
}
_SUPERCLASSES = "environment space object scene place item area view thing pattern structure landscape vista creature"
_CSP_NOUN_PROMPTS = (
    "a close-up photo of the nice {}.|a photo with the nice {}.|a good photo with the nice {}.|a photo of the nice {}."
    "|{}|the {}|the good {}|the nice {}"
)


class Words(NamedTuple):
    """Candidates for negative labels, without duplicates: a word that is both is a noun."""

    nouns: list[str]
    adjectives: list[str]


class Pool(NamedTuple):
    """How candidates become texts, and which of them become negative labels."""

    name: str
    noun_prompts: tuple[str, ...]  # of nouns and of classes
    adjective_prompts: tuple[str, ...]
    superclasses: tuple[str, ...] = ("{}",)  # each adjective fills one of them, drawn at random
    left_out: tuple[str, ...] = ("noun.animal", "noun.food")  # lexicographer files
    max_cosine: float = float("inf")  # a candidate with a higher cosine to any class is left out
    share: float = 0.15  # of the nouns, and of the adjectives
    quantile: float = 0.95  # of a candidate's cosines to the classes: the candidates with the lowest are mined
    groups: int = 100


NEGLABEL = Pool("NegLabel", ("the nice {}",), ("This is a {} photo",))
CSP = Pool(
    "CSP",
    tuple(_CSP_NOUN_PROMPTS.split("|")),
    ("{}", "a nice photo of {}", "a good photo of {}", "a close-up photo of {}"),
    tuple(f"{{}} {name}" for name in _SUPERCLASSES.split()),
    (*NEGLABEL.left_out, "noun.person", "noun.quantity", "noun.group", "adj.pert"),
    max_cosine=0.95,
)


class Negatives(NamedTuple):
    """Mined negative labels, n in each of G groups, and the class names in the pool's prompts."""

    names: list[str]  # G * n, group after group
    weights: Tensor  # [G, n, D], L2-normalised
    labels: Tensor  # [C, D], L2-normalised


def read_words(path: str | Path, left_out: Sequence[str] = NEGLABEL.left_out) -> Words:
    """Candidate words from a file or folder of the user; nothing is downloaded.

    path: WordNet's database folder (data.noun, data.adj or both); a folder of lists named as its lexicographer files
        (noun.act.txt, adj.all.txt, ...; one word per line); or one list, with lines of a word, taken as a noun, or of
        "noun" or "adj", a tab and a word.
    left_out: lexicographer files whose words are left out, unless another file has them too.
    Raises FileNotFoundError for a missing path, ValueError for another form or no words.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such word list or WordNet folder")
    unknown = sorted(set(left_out) - set(LEXICOGRAPHER_FILES.values()))
    if unknown:
        raise ValueError(f"left_out={unknown}: the lexicographer files are {', '.join(LEXICOGRAPHER_FILES.values())}")
    words: dict[str, dict[str, str]] = {"noun": {}, "adj": {}}
    try:
        for kind, word in _read(path, left_out):
            if _key(word):
                words[kind].setdefault(_key(word), word.replace("_", " ").strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    if not any(words.values()):
        raise ValueError(f"{path}: no words found; expected data.noun, data.adj, noun.*.txt, adj.*.txt or a list")
    return Words([*words["noun"].values()], [word for key, word in words["adj"].items() if key not in words["noun"]])


@torch.no_grad()
def mine(
    model: CLIPN,
    tokenizer: Callable[[list[str]], Tensor],
    words: Words,
    class_names: Sequence[str],
    pool: Pool = NEGLABEL,
    seed: int = 0,
) -> Negatives:
    """The negative labels of these classes: the nouns and the adjectives that are farthest from the classes.

    They are shuffled and split into groups of one size. The nearest of the adjectives that do not fill a group are
    dropped (NegLabel, section 3). A class name is no candidate. Fewer negatives than groups form a group each.
    Raises ValueError for no class names, or if no candidate remains. The model is in evaluation mode.
    """

    def encode(texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
        return class_weights(model.encode_text, tokenizer, texts, prompts)

    keys, draw = {_key(name) for name in class_names}, random.Random(seed)
    nouns = [word for word in words.nouns if _key(word) not in keys]
    adjectives = [fill(draw.choice(pool.superclasses), word) for word in words.adjectives if _key(word) not in keys]
    if not class_names or not (nouns or adjectives):
        raise ValueError(f"negative labels: {len(class_names)} class names, {len(nouns + adjectives)} candidates")
    labels = encode(class_names, pool.noun_prompts)
    names, weights = [], []
    for candidates, prompts in ((nouns, pool.noun_prompts), (adjectives, pool.adjective_prompts)):
        if candidates:
            features = encode(candidates, prompts)
            chosen = _farthest(features, labels, pool)
            names += [candidates[i] for i in chosen.tolist()]
            weights.append(features[chosen])
    if not names:
        raise ValueError("negative labels: every candidate is too near to a class")
    groups = min(pool.groups, len(names))
    order = torch.randperm(len(names) // groups * groups, generator=torch.Generator().manual_seed(seed))
    grouped = torch.cat(weights)[order.to(labels.device)].unflatten(0, (groups, -1))
    return Negatives([names[i] for i in order.tolist()], grouped, labels)


def neglabel_log_odds(
    image_features: Tensor, negatives: Negatives, scale: float = 100.0, head: Head | None = None
) -> Tensor:
    """[B, D] -> log odds [B] of the softmax mass on the classes, mean over groups of negatives (NegLabel; CSP).

    With a head, the mass of each class is multiplied by its p_yes: CLIPN's ATD with NegLabel's negatives in the
    softmax, an ablation of this project, not published. The head has the negatives' classes in the same order; another
    number of them raises ValueError.
    """
    classes = scale * image_features @ negatives.labels.T
    words = (scale * image_features @ negatives.weights.flatten(0, 1).T).unflatten(1, negatives.weights.shape[:2])
    of_groups = classes.logsumexp(dim=1, keepdim=True) - words.logsumexp(dim=2)
    mass = mean_log_odds(torch.full_like(of_groups, -math.log(of_groups.shape[1])), of_groups)
    if head is None:
        return mass
    if len(head.weight_yes) != len(negatives.labels):
        raise ValueError(f"negatives of {len(negatives.labels)} classes, a head of {len(head.weight_yes)}")
    yes, no = head(image_features, scale)
    return _log_odds_of_both(mean_log_odds(classes.log_softmax(dim=1), yes - no), mass)


def _log_odds_of_both(first: Tensor, second: Tensor) -> Tensor:
    """Log odds of the product of two probabilities, from theirs: p q / (1 - p + p (1 - q))."""
    log_first = F.logsigmoid(first)
    return log_first + F.logsigmoid(second) - torch.logaddexp(F.logsigmoid(-first), log_first + F.logsigmoid(-second))


def save_negatives(negatives: Negatives, path: str | Path) -> None:
    """Write the mined labels as a table: the number of the group, a tab, the label."""
    size = negatives.weights.shape[1]
    with atomic_write(path) as stream:
        stream.writelines(f"{i // size}\t{name}\n".encode() for i, name in enumerate(negatives.names))


def _farthest(features: Tensor, labels: Tensor, pool: Pool) -> Tensor:
    """The numbers of the candidates [N, D] to mine, the farthest from the labels [C, D] first; at least one of them."""
    size = max(1, 2**23 // len(labels))  # torch.quantile takes no more than 2**24 numbers
    nearness = []
    for part in features.split(size):
        cosines = part @ labels.T
        nearness.append(cosines.quantile(pool.quantile, dim=1))
        nearness[-1][cosines.amax(dim=1) > pool.max_cosine] = float("inf")
    ranked, order = torch.cat(nearness).sort(stable=True)
    count = min(max(1, int(len(features) * pool.share)), int(ranked.isfinite().sum()))
    return order[:count]


def _read(path: Path, left_out: Sequence[str]) -> Iterable[tuple[str, str]]:
    """("noun" or "adj", word) from any of the forms."""
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
            raise ValueError(f"{path}, line {number}: not in WordNet's database form: {line[:60]!r}") from error
        if source not in left_out:
            yield from (word.split("(")[0] for word in words)  # galore(ip): the position of an adjective


def _key(word: str) -> str:
    """The form in which words are compared."""
    return word.replace("_", " ").strip().casefold()
