"""NegLabel and CSP: reading words, mining and scoring, against plain loops."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import architecture
from hypothesis import given, settings
from hypothesis import strategies as st

import clipn
from clipn.methods.negatives import (
    CSP,
    NEGLABEL,
    POOLS,
    Negatives,
    Words,
    mine,
    neglabel,
    neglabel_clipn,
    read_words,
    save_negatives,
)
from clipn.scores import SCORES

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


@pytest.fixture
def wordnet(tmp_path):
    (tmp_path / "data.noun").write_text(DATA_NOUN)
    (tmp_path / "data.adj").write_text(DATA_ADJ)
    return tmp_path


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = clipn.create_model_and_transforms(architecture(text={"width": 64}), num_prompts=0)[0]
    return model, clipn.get_tokenizer(model.architecture)


NAMES = ["cat", "fire engine", "violin"]
WORDS = Words([f"noun{n} thing" for n in range(61)], [f"adj{n}" for n in range(45)])


# Words


def test_wordnets_database_without_animals_and_food(wordnet):
    words = read_words(wordnet)
    assert words.nouns == ["entity", "anvil", "b b", *"cdefghij", "k k", "dog", "frump"], "dog is a person, too"
    assert words.adjectives == ["abounding", "galore", "outback", "ready to hand", "dental"]
    for_csp = read_words(str(wordnet), CSP.left_out)
    assert "dog" not in for_csp.nouns and "dental" not in for_csp.adjectives and "frump" in for_csp.adjectives
    assert "cheeseburger" in read_words(wordnet, ()).nouns


def test_lists_in_a_folder(tmp_path):
    for name, text in {
        "noun.act": "run\nlong_jump\n\n",
        "noun.animal": "cat\n",
        "adj.all": "Run\nred\n",
        "verb": "go",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_words(tmp_path) == Words(["run", "long jump"], ["red"])
    assert read_words(tmp_path, ["noun.act"]) == Words(["cat"], ["Run", "red"])


def test_one_list(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffnoun\tpiano\nadj\tcrème brûlée\n\nviolin\nnoun\tPIANO\nnoun\t \n", encoding="utf-8")
    assert read_words(path) == Words(["piano", "violin"], ["crème brûlée"])


def test_what_cannot_be_read(tmp_path, wordnet):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_words(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"noun\.beast.*noun\.animal"):
        read_words(wordnet, ["noun.beast"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no words found"):
        read_words(tmp_path / "empty")
    (tmp_path / "list").write_text("noun\tpiano\nverb\tgo\n")
    with pytest.raises(ValueError, match="list, line 2"):
        read_words(tmp_path / "list")
    (tmp_path / "latin").write_bytes("noun\tGemüse".encode("latin-1"))
    with pytest.raises(ValueError, match="latin: not text in UTF-8"):
        read_words(tmp_path / "latin")
    for line in ("00001740 03 n 02 entity 0", "some words", "00001740 77 n 01 entity 0 000 | x"):
        (wordnet / "data.noun").write_text(f"{DATA_NOUN}{line}\n")
        with pytest.raises(ValueError, match=r"data\.noun, line 8: not of WordNet"):
            read_words(wordnet)


# Mining


def embed(base, text):
    model, tokenizer = base
    with torch.no_grad():
        return model.encode_text(tokenizer([text]))[0].double().numpy()


def plain_ranking(base, texts, names, pool, quantile=0.95):
    """Candidates (a list of texts each), the farthest first; without those that are too near."""

    def mean(prompts, name):
        total = sum(embed(base, prompt.replace("{}", name)) for prompt in prompts)
        return total / np.linalg.norm(total)

    labels = [mean(pool.noun_prompts, name) for name in names]
    nearness = {}
    for name, prompts in texts:
        cosines = sorted(float(label @ mean(prompts, name)) for label in labels)
        place = quantile * (len(cosines) - 1)
        low, high = cosines[math.floor(place)], cosines[math.ceil(place)]
        if cosines[-1] <= pool.too_near:
            nearness[name] = low + (place - math.floor(place)) * (high - low)
    return sorted(nearness, key=nearness.get)


@pytest.mark.parametrize("quantile", [0.95, 0.4])
def test_the_farthest_of_nouns_and_of_adjectives_are_mined(base, quantile):
    found = mine(*base, WORDS, NAMES, quantile=quantile, groups=5, batch_size=16)
    nouns = plain_ranking(base, [(w, NEGLABEL.noun_prompts) for w in WORDS.nouns], NAMES, NEGLABEL, quantile)
    adjectives = plain_ranking(
        base, [(w, NEGLABEL.adjective_prompts) for w in WORDS.adjectives], NAMES, NEGLABEL, quantile
    )
    chosen = nouns[: int(0.15 * 61)] + adjectives[: int(0.15 * 45)]
    assert len(chosen) == 9 + 6
    assert sorted(found.names) == sorted(chosen) and found.names != chosen, "all 15, shuffled"
    assert found.weights.shape == (5, 3, 32) and found.labels.shape == (3, 32)
    for name, weight in zip(found.names, found.weights.flatten(0, 1), strict=True):
        prompt = "the nice {}" if name in WORDS.nouns else "This is a {} photo"
        np.testing.assert_allclose(weight.numpy(), embed(base, prompt.replace("{}", name)), atol=1e-5)
    for name, label in zip(NAMES, found.labels, strict=True):
        np.testing.assert_allclose(label.numpy(), embed(base, f"the nice {name}"), atol=1e-5)


def test_what_fills_no_group_is_dropped(base):
    found = mine(*base, WORDS, NAMES, groups=4)
    nouns = plain_ranking(base, [(w, NEGLABEL.noun_prompts) for w in WORDS.nouns], NAMES, NEGLABEL)[:9]
    adjectives = plain_ranking(base, [(w, NEGLABEL.adjective_prompts) for w in WORDS.adjectives], NAMES, NEGLABEL)[:6]
    assert sorted(found.names) == sorted(nouns + adjectives[:3]) and found.weights.shape == (4, 3, 32)


def test_the_seed_shuffles(base):
    first, again, other = (mine(*base, WORDS, NAMES, groups=5, seed=seed) for seed in (0, 0, 1))
    assert first.names == again.names and torch.equal(first.weights, again.weights)
    assert first.names != other.names and sorted(first.names) == sorted(other.names)


def test_csp_asks_for_adjectives_of_superclasses(base):
    words = Words(WORDS.nouns[:8], WORDS.adjectives[:9])
    pool = CSP._replace(too_near=2.0)
    found = mine(*base, words, NAMES, pool, share=0.5, groups=1, seed=3)
    draw = random.Random(3)
    phrases = [draw.choice(CSP.superclasses).replace("{}", word) for word in words.adjectives]
    assert len(CSP.superclasses) == 14 and len(CSP.noun_prompts) == 8 and len(CSP.adjective_prompts) == 4
    nouns = plain_ranking(base, [(w, CSP.noun_prompts) for w in words.nouns], NAMES, pool)[:4]
    adjectives = plain_ranking(base, [(p, CSP.adjective_prompts) for p in phrases], NAMES, pool)[:4]
    assert sorted(found.names) == sorted(nouns + adjectives)


def test_csp_leaves_out_what_is_near_to_any_class(base):
    """Random towers find all texts alike: the limit is put where it parts them."""
    model, tokenizer = base
    with torch.no_grad():
        features, labels = (
            model.encode_text(tokenizer([f"the nice {n}" for n in group])) for group in (WORDS.nouns, NAMES)
        )
    nearest = (features @ labels.T).amax(dim=1)
    pool = NEGLABEL._replace(too_near=nearest.median().item())
    found = mine(model, tokenizer, Words(WORDS.nouns, []), NAMES, pool, share=1.0, groups=1)
    allowed = {name for name, value in zip(WORDS.nouns, nearest.tolist(), strict=True) if value <= pool.too_near + 1e-6}
    assert set(found.names) <= allowed and len(found.names) >= 30
    with pytest.raises(ValueError, match="every candidate is too near"):
        mine(model, tokenizer, WORDS, NAMES, NEGLABEL._replace(too_near=-1.0))


def test_a_class_is_not_its_own_negative(base):
    found = mine(*base, Words(["Cat", "fire_engine", "piano"], ["violin", "red"]), NAMES, share=1.0)
    assert sorted(found.names) == ["piano", "red"] and found.weights.shape == (2, 1, 32)
    with pytest.raises(ValueError, match="0 candidates"):
        mine(*base, Words(["cat"], []), NAMES)
    with pytest.raises(ValueError, match="0 class names"):
        mine(*base, WORDS, [])


def test_one_word_and_one_class(base):
    found = mine(*base, Words([], ["red"]), ["cat"])
    assert found.names == ["red"] and found.weights.shape == (1, 1, 32)
    assert neglabel(found.labels, found).shape == (1,)


def test_the_list_is_saved(base, tmp_path):
    found = mine(*base, WORDS, NAMES, groups=5)
    save_negatives(found, tmp_path / "new" / "negatives.tsv")
    rows = [line.split("\t") for line in (tmp_path / "new" / "negatives.tsv").read_text().splitlines()]
    assert [name for _, name in rows] == found.names
    assert [int(group) for group, _ in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3


# Scoring


def drawn(groups, size, classes, images, seed=0, width=8):
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, width, generator=generator, dtype=torch.float64), dim=-1)

    negatives = Negatives(["x"] * (groups * size), unit(groups, size), unit(classes))
    return negatives, clipn.Head(unit(classes), unit(classes)), unit(images)


def plain_mass(image, negatives, scale):
    """[G][C]: the softmax of each class beside each group."""
    masses = []
    for group in negatives.weights:
        logits = [scale * float(image @ w) for w in [*negatives.labels, *group]]
        parts = [math.exp(value - max(logits)) for value in logits]
        masses.append([part / sum(parts) for part in parts[: len(negatives.labels)]])
    return masses


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_scores_are_those_of_a_plain_loop(groups, size, classes, images, seed):
    negatives, head, features = drawn(groups, size, classes, images, seed)
    for scale in (10.0, 100.0):
        mass = [plain_mass(image, negatives, scale) for image in features]
        expected = [sum(map(sum, groups_)) / groups for groups_ in mass]
        got = neglabel(features, negatives, scale, block=2)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)
        yes, no = head(features, scale)
        p_yes = torch.sigmoid(yes - no)
        expected = [
            sum(p * m for one in groups_ for p, m in zip(p_yes[i].tolist(), one, strict=True)) / groups
            for i, groups_ in enumerate(mass)
        ]
        got = neglabel_clipn(features, negatives, head, scale, block=2)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_higher_means_in_distribution():
    negatives, head, _ = drawn(5, 4, 3, 1)
    sure = clipn.Head(negatives.labels, -negatives.labels)
    for score in (lambda f: neglabel(f, negatives), lambda f: neglabel_clipn(f, negatives, sure)):
        assert (score(negatives.labels) > 0.9).all() and (score(negatives.weights[:, 0]) < 0.9).all()


def test_the_combination_without_a_negative_that_counts_is_atd():
    negatives, head, features = drawn(2, 3, 4, 6)
    same = clipn.Head(negatives.labels, head.weight_no)
    opposite = negatives._replace(weights=-F.normalize(features.sum(0), dim=0).expand(2, 3, 8))
    near = features[
        (features @ F.normalize(features.sum(0), dim=0) > 0) & ((features @ same.weight_yes.T).amax(1) > 0.3)
    ]
    assert len(near)
    atd = SCORES["ATD"](*same(near, 100.0))
    torch.testing.assert_close(neglabel_clipn(near, opposite, same), atd, rtol=1e-4, atol=1e-9)


def test_huge_logits_and_another_number_of_classes():
    negatives, head, features = drawn(3, 2, 4, 5)
    for score in (neglabel(features, negatives, 1e5), neglabel_clipn(features, negatives, head, 1e5)):
        assert score.isfinite().all() and (score >= 0).all() and (score <= 1).all()
    with pytest.raises(ValueError, match="negatives of 4 classes, a head of 3"):
        neglabel_clipn(features, negatives, clipn.Head(head.weight_yes[:3], head.weight_no[:3]))
    assert set(POOLS) == {"NegLabel", "CSP"}
