"""NegLabel and CSP: reading words, mining and scoring, against plain loops."""

import random
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import read, spell
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax

import clipn
from clipn.methods.negatives import CSP, NEGLABEL, Negatives, Words, mine, neglabel_log_odds, read_words, save_negatives

# Lines of WordNet's data files, with the licence's first lines and pointers that hold words' offsets
DATA_NOUN = """  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton University under the following license.
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived
00002684 06 n 0b anvil 0 b_b 1 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k_k 0 002 @ 00001740 n 0000 ~ 0 n 0000 | ten and one
02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus Canis
10114209 18 n 02 dog 1 frump 0 001 @ 10787470 n 0000 | a dull unattractive person
07697313 13 n 01 cheeseburger 0 001 @ 07697100 n 0000 | a hamburger with cheese
"""
DATA_ADJ = """  1 This software and database is being provided to you, the LICENSEE, by
00014358 00 s 03 abounding 0 galore(ip) 0 frump 0 001 & 00013887 a 0000 | existing in abundance
00020103 00 s 02 outback(a) 0 ready_to_hand(p) 0 001 & 00019874 a 0000 | inaccessible
02600000 01 a 01 Abounding 0 000 | twice, but for its case
02600001 01 a 01 dental 0 000 | of teeth
"""
NAMES = ["cat", "fire engine", "violin"]
WORDS = Words([f"noun{n} thing" for n in range(61)], [f"adj{n}" for n in range(45)])


@pytest.fixture
def wordnet(tmp_path):
    (tmp_path / "data.noun").write_text(DATA_NOUN)
    (tmp_path / "data.adj").write_text(DATA_ADJ)
    return tmp_path


# Words


def test_wordnets_database_without_animals_and_food(wordnet):
    words = read_words(wordnet)
    assert words.nouns == ["entity", "anvil", "b b", *"cdefghij", "k k", "dog", "frump"], "dog is a person, too"
    assert words.adjectives == ["abounding", "galore", "outback", "ready to hand", "dental"]
    for_csp = read_words(str(wordnet), CSP.left_out)
    assert "dog" not in for_csp.nouns and "dental" not in for_csp.adjectives and "frump" in for_csp.adjectives
    assert "cheeseburger" in read_words(wordnet, ()).nouns


def test_lists_in_a_folder(tmp_path):
    lists = {"noun.act": "run\nlong_jump\n\n", "noun.animal": "cat\n", "adj.all": "Run\nred\n", "verb": "go"}
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_words(tmp_path) == Words(["run", "long jump"], ["red"])
    assert read_words(tmp_path, ["noun.act"]) == Words(["cat"], ["Run", "red"])


def test_one_list(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffnoun\tpiano\nadj\tcrème brûlée\n\nviolin\nnoun\tPIANO\nnoun\t \n", encoding="utf-8")
    assert read_words(path) == Words(["piano", "violin"], ["crème brûlée"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "nowhere: no such word list or WordNet folder"),
        ("empty/verb.txt", b"go", "empty: no words found"),
        ("list", b"noun\tpiano\nverb\tgo\n", "list, line 2"),
        ("latin", "noun\tGemüse".encode("latin-1"), "latin: not text in UTF-8"),
        ("net/data.noun", f"{DATA_NOUN}00001740 03 n 02 entity 0\n".encode(), r"data\.noun, line 8: not in WordNet"),
        ("net/data.noun", f"{DATA_NOUN}some words\n".encode(), r"data\.noun, line 8: not in WordNet"),
        ("net/data.noun", f"{DATA_NOUN}00001740 77 n 01 entity 0 000 | x\n".encode(), r"data\.noun, line 8"),
    ],
)
def test_words_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_words(path.parent if "/" in name else path)


def test_an_unknown_lexicographer_file(wordnet):
    with pytest.raises(ValueError, match=r"noun\.beast.*noun\.animal"):
        read_words(wordnet, ["noun.beast"])


# Mining. Each text has a random direction of its own, so that no two candidates are nearly equally far.


def embed(text: str) -> torch.Tensor:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))
    return F.normalize(direction, dim=0)


class TextTower:
    def encode_text(self, tokens):
        return torch.stack([embed(text) for text in read(tokens)])


def mined(words=WORDS, names=NAMES, pool=NEGLABEL, seed=0, **changes):
    return mine(TextTower(), spell, words, names, pool._replace(**changes), seed)


def ranked(candidates, prompts, pool=NEGLABEL):
    """The candidates, the farthest from the classes first; without those that are too near."""

    def mean(prompts, name):
        total = sum(embed(prompt.replace("{}", name)).double().numpy() for prompt in prompts)
        return total / np.linalg.norm(total)

    labels = [mean(pool.noun_prompts, name) for name in NAMES]
    cosines = {name: [label @ mean(prompts, name) for label in labels] for name in candidates}
    kept = [name for name in candidates if max(cosines[name]) <= pool.max_cosine]
    return sorted(kept, key=lambda name: np.quantile(cosines[name], pool.quantile))


@pytest.mark.parametrize("quantile", [0.95, 0.4])
def test_the_farthest_nouns_and_adjectives_are_mined(quantile):
    pool = NEGLABEL._replace(quantile=quantile)
    negatives = mined(quantile=quantile, groups=5)
    nouns = ranked(WORDS.nouns, pool.noun_prompts, pool)
    adjectives = ranked(WORDS.adjectives, pool.adjective_prompts, pool)
    chosen = nouns[:9] + adjectives[:6]  # 15 % of 61 and of 45
    assert sorted(negatives.names) == sorted(chosen) and negatives.names != chosen, "all 15, shuffled"
    assert negatives.weights.shape == (5, 3, 32) and negatives.labels.shape == (3, 32)
    for name, weight in zip(negatives.names, negatives.weights.flatten(0, 1), strict=True):
        text = f"the nice {name}" if name in WORDS.nouns else f"This is a {name} photo"
        torch.testing.assert_close(weight, embed(text))
    torch.testing.assert_close(negatives.labels, torch.stack([embed(f"the nice {name}") for name in NAMES]))
    fewer = mined(quantile=quantile, groups=4)
    assert sorted(fewer.names) == sorted(nouns[:9] + adjectives[:3]), "the last three do not fill a group"
    assert fewer.weights.shape == (4, 3, 32)


def test_the_seed_shuffles():
    first, again, other = (mined(groups=5, seed=seed) for seed in (0, 0, 1))
    assert first.names == again.names and torch.equal(first.weights, again.weights)
    assert first.names != other.names and sorted(first.names) == sorted(other.names)


def test_csp_puts_adjectives_before_superclasses_and_leaves_out_what_is_near_to_a_class():
    assert len(CSP.superclasses) == 14 and len(CSP.noun_prompts) == 8 and len(CSP.adjective_prompts) == 4
    words, draw = Words(WORDS.nouns[:8], WORDS.adjectives[:9]), random.Random(3)
    phrases = [draw.choice(CSP.superclasses).replace("{}", word) for word in words.adjectives]
    nouns, adjectives = ranked(words.nouns, CSP.noun_prompts, CSP), ranked(phrases, CSP.adjective_prompts, CSP)
    assert sorted(mined(words, pool=CSP, share=0.5, groups=1, seed=3).names) == sorted(nouns[:4] + adjectives[:4])
    strict = CSP._replace(max_cosine=0.1)
    nouns, adjectives = ranked(words.nouns, CSP.noun_prompts, strict), ranked(phrases, CSP.adjective_prompts, strict)
    assert 0 < len(nouns + adjectives) < 17
    assert sorted(mined(words, pool=strict, share=1.0, groups=1, seed=3).names) == sorted(nouns + adjectives)
    with pytest.raises(ValueError, match="every candidate is too near"):
        mined(max_cosine=-1.0)


def test_a_class_is_not_its_own_negative():
    negatives = mined(Words(["Cat", "fire_engine", "piano"], ["violin", "red"]), share=1.0)
    assert sorted(negatives.names) == ["piano", "red"] and negatives.weights.shape == (2, 1, 32)
    one = mined(Words([], ["red"]), ["cat"])
    assert one.names == ["red"] and neglabel_log_odds(one.labels, one).shape == (1,)
    with pytest.raises(ValueError, match="0 candidates"):
        mined(Words(["cat"], []))
    with pytest.raises(ValueError, match="0 class names"):
        mined(names=[])


def test_the_list_is_saved(tmp_path):
    negatives, path = mined(groups=5), tmp_path / "new" / "negatives.tsv"
    save_negatives(negatives, path)
    assert path.read_text() == "".join(f"{n // 3}\t{name}\n" for n, name in enumerate(negatives.names))


# Scoring


def drawn(groups, size, classes, images, seed=0, width=8):
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, width, generator=generator, dtype=torch.float64), dim=-1)

    negatives = Negatives(["x"] * (groups * size), unit(groups, size), unit(classes))
    return negatives, clipn.Head(unit(classes), unit(classes)), unit(images)


def slow_masses(image, negatives, scale):
    """[G][C + size]: the softmax of the classes and the words of each group."""
    return [softmax(scale * torch.cat([negatives.labels, group]) @ image) for group in negatives.weights]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_scores_agree_with_a_plain_loop(groups, size, classes, images, seed):
    negatives, head, features = drawn(groups, size, classes, images, seed)
    for scale in (10.0, 100.0):
        masses = np.array([slow_masses(image, negatives, scale) for image in features])
        known, words = masses[:, :, :classes], masses[:, :, classes:].sum(axis=(1, 2))  # [B, G, C] and [B]
        scores = neglabel_log_odds(features, negatives, scale)
        np.testing.assert_allclose(scores.numpy(), np.log(known.sum(axis=(1, 2))) - np.log(words), atol=1e-8)
        yes, no = head(features, scale)
        shown, absent = ((known * expit(sign * (yes - no).numpy())[:, None]).sum(axis=(1, 2)) for sign in (1, -1))
        scores = neglabel_log_odds(features, negatives, scale, head)
        np.testing.assert_allclose(scores.numpy(), np.log(shown) - np.log(words + absent), atol=1e-8)


def test_huge_logits_and_another_number_of_classes():
    negatives, head, features = drawn(1, 6, 4, 5)
    for score in (neglabel_log_odds(features, negatives, 1e5), neglabel_log_odds(features, negatives, 1e5, head)):
        assert len(score.unique()) == len(score), "no ties, though the probabilities are 0 and 1"
    negatives, head, features = drawn(3, 2, 4, 5)
    for score in (neglabel_log_odds(features, negatives, 1e5), neglabel_log_odds(features, negatives, 1e5, head)):
        assert score.isfinite().all()
    with pytest.raises(ValueError, match="negatives of 4 classes, a head of 3"):
        neglabel_log_odds(features, negatives, head=clipn.Head(head.weight_yes[:3], head.weight_no[:3]))
