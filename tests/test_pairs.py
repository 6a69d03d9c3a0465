"""Image-caption pairs: tables, the order of training, samples, and the replacement of broken pairs."""

import pytest
import torch
from helpers import (
    captions,
    default_preprocess,
    image_bytes,
    messages,
    numbered_samples,
    png_header,
    read,
    spell,
    write_images,
    write_shard,
)

import clipn.data.pairs
from clipn.config.schema import Config, DataConfig
from clipn.data.pairs import EpochBatches, open_pairs, training_loader
from clipn.data.shards import CAUSES
from clipn.runtime.random import stream

JPG = image_bytes()
HUGE = png_header(60_000, 60_000)


# Tables


def test_a_csv_with_paths_beside_it(tmp_path, settings):
    write_images(tmp_path / "images", "1.png", "2.png")
    rows = 'filepath,title,extra\nimages/1.png,"a cat, asleep, ""so it says""",x\nimages/2.png,NA,y\n'
    (tmp_path / "pairs.csv").write_text(rows, encoding="utf-8")
    pairs = open_pairs(settings(tmp_path / "pairs.csv"))
    assert captions(pairs) == ['a cat, asleep, "so it says"', "NA"]
    assert pairs[0].image == (tmp_path / "images" / "1.png").read_bytes()


def test_a_tsv_with_its_own_columns_and_absolute_paths(tmp_path, settings):
    image = write_images(tmp_path / "else where", "é.png") / "é.png"
    table = write_images(tmp_path / "sub") / "pairs.tsv"
    table.write_text(f"text\tfile\na dog, running\t{image}\n", encoding="utf-8")
    pairs = open_pairs(settings(table, image_column="file", caption_column="text"))
    assert (pairs[0].caption, pairs[0].image) == ("a dog, running", image.read_bytes())


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.tsv", 'filepath\ttitle\n1.png\t"no end\n2.png\ttwo\n', "not a readable table"),
        ("x.csv", "filepath,title\n1.png,a cat, asleep\n2.png,two\n", "not a readable table"),
        ("x.csv", "filepath,title\n1.png,one\n2.png,a cat, asleep\n", "not a readable table"),
        ("x.csv", "file,title\na.png,b\n", r"no column 'filepath' \(data\.image_column\).*file, title"),
        ("x.csv", "filepath,text\na.png,b\n", r"no column 'title' \(data\.caption_column\).*filepath, text"),
        ("x.csv", '"two\nlines",title\na.png,b\n', "two.*lines"),
        ("x.csv", "", "not a readable table"),
        ("x.csv", "\n", "not a readable table"),
        ("x.csv", "filepath,title\n", "holds no rows"),
    ],
)
def test_a_table_that_does_not_fit_is_reported_in_one_line(tmp_path, settings, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*{message}") as error:
        open_pairs(settings(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "a\nb", "x" * 5000, "1.png/x"], ids=lambda name: repr(name)[:8])
def test_an_impossible_image_path_is_a_bad_pair_without_retries(tmp_path, run, caplog, monkeypatch, name):
    monkeypatch.setattr("clipn.data.storage.time.sleep", lambda seconds: pytest.fail("a retry"))
    write_images(tmp_path, "1.png")
    (tmp_path / "x.csv").write_text(f'filepath,title\n"{name}",n 0\n1.png,n 1\n')
    (batch,) = run(shards=str(tmp_path / "x.csv"), batch_size=2, epochs=1)[0]
    assert batch["number"].tolist() == [1, 1]
    skipped = batch["skipped"].sum(dim=0)
    assert skipped.sum() == skipped[CAUSES.index("unreadable file")] == len(messages(caplog).splitlines())


def test_a_table_among_other_files_is_refused(tmp_path, settings):
    (tmp_path / "x.csv").write_text("filepath,title\na.png,b\n")
    shard = write_shard(tmp_path / "x.tar", numbered_samples(2))
    for mixed in ([tmp_path / "x.csv", shard], [shard, tmp_path / "x.csv"]):
        with pytest.raises(ValueError, match=r"x\.csv"):
            open_pairs(settings(mixed))


# The order of training


def order(num_pairs=10, available=10, batch_size=3, epochs=2, seed=0, start=0):
    return list(EpochBatches(num_pairs, available, batch_size, epochs, seed, start))


def test_each_epoch_is_another_permutation():
    batches = order(num_pairs=12, available=12, batch_size=4, epochs=3)
    assert [len(batch) for batch in batches] == [4] * 9
    epochs = [[number for batch in batches[3 * e : 3 * e + 3] for _, number in batch] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(epoch == step // 3 for step, batch in enumerate(batches) for epoch, _ in batch)


def test_the_order_depends_on_seed_and_epoch_alone():
    first = order(epochs=2)
    assert order(epochs=2) == first
    assert order(epochs=5)[:6] == first, "not on how long training will be"
    assert order(seed=1)[:3] != first[:3]
    flat = [pair for batch in order(12, 12, 4) for pair in batch]
    assert [pair for batch in order(12, 12, 6) for pair in batch] == flat, "not on the batch size"
    torch.manual_seed(5)
    assert order(epochs=2) == first, "not on the state of other generators"


def test_streams_depend_on_tag_and_numbers_alone():
    keys = [("order", 0, 1), ("prompt", 0, 1), ("order", 1, 0), ("order", 0, 1, 0), ("order", 0), ("order", 0, 11)]
    first, second = ([tuple(stream(*key).integers(2**60, size=2)) for key in keys] for _ in range(2))
    assert len(set(first)) == 6 and first == second


def test_pairs_after_the_last_whole_batch_are_used_in_other_epochs():
    batches = order(num_pairs=10, batch_size=3, epochs=20)
    assert len(batches) == 60 and all(len(batch) == 3 for batch in batches)
    used = [{number for batch in batches[3 * e : 3 * e + 3] for _, number in batch} for e in range(20)]
    assert all(len(numbers) == 9 for numbers in used)
    assert set.union(*used) == set(range(10))
    assert len({min(set(range(10)) - numbers) for numbers in used}) > 3, "not always the same one"


def test_a_short_epoch_draws_from_all_pairs():
    batches = order(num_pairs=4, available=100, batch_size=2, epochs=50)
    assert len(batches) == 100
    assert len({number for batch in batches for _, number in batch}) > 70


def test_a_later_start_skips_batches():
    for start in (0, 1, 3, 4, 6):
        batches = EpochBatches(10, 10, 3, 2, 0, start)
        assert list(batches) == order(epochs=2)[start:] and len(batches) == 6 - start


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one_process(monkeypatch, ranks):
    alone = order(num_pairs=26, available=26, batch_size=6, epochs=2, start=1)
    monkeypatch.setattr(clipn.data.pairs, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(clipn.data.pairs, "rank", lambda rank=rank: rank)
        shares.append(order(num_pairs=26, available=26, batch_size=6, epochs=2, start=1))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == alone
    assert all(len(part) == 6 // ranks for share in shares for part in share)


# What training gets


@pytest.fixture
def run(tmp_path):
    """A config over a shard of the given samples, and its loader."""

    path = tmp_path / "run.tar"

    def _run(samples=None, start=0, batch_size=4, epochs=2, objective="clipn", num_prompts=16, **data):
        if not path.exists():
            write_shard(path, numbered_samples(10) if samples is None else samples)
        config = Config()
        config.data = DataConfig(**{"shards": str(path), "index_dir": str(tmp_path / "index"), "workers": 0} | data)
        config.run.device, config.model.num_prompts = "cpu", num_prompts
        config.train.batch_size, config.train.epochs, config.train.objective = batch_size, epochs, objective
        return training_loader(config, open_pairs(config.data), default_preprocess(16), spell, start)

    _run.path = path
    return _run


def assert_same_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def numbers(batches: list[dict]) -> list[int]:
    return [int(text.rpartition(" ")[2]) for batch in batches for text in read(batch["tokens"])]


def test_a_batch_holds_images_and_tokens(run):
    loader, steps = run()
    batches = list(loader)
    assert steps == 2 and len(batches) == len(loader) == 4
    for batch in batches:
        assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert batch["skipped"].shape == (4, len(CAUSES)) and not batch["skipped"].any()
        assert batch["number"].tolist() == numbers([batch])
        assert "no_tokens" not in batch


def test_image_and_caption_stay_together(run):
    for batch in run()[0]:
        colours, n = batch["image"].float().mean(dim=(2, 3)), torch.tensor(numbers([batch]))
        assert torch.allclose(colours, torch.stack([2.0 * n, n, 255 - n], dim=1), atol=3), "JPEG rounds a little"


@pytest.mark.parametrize("start, workers", [(0, 2), (1, 0), (2, 0)])
def test_batches_are_the_same_for_any_start_and_number_of_workers(run, start, workers):
    draws = {"crop_scale": [0.2, 1.0], "flip": 0.5, "color_jitter": 0.4, "erase": 0.5}
    draws["caption_templates"] = ["{}", "a {}", "the {}", "some {}"]
    assert_same_batches(list(run(start=start, workers=workers, **draws)[0]), list(run(**draws)[0])[start:])


def test_each_epoch_crops_an_image_differently(run):
    first, second = (batch["image"][batch["number"].argsort()] for batch in run(erase=1.0, batch_size=10)[0])
    assert not torch.equal(first, second)


def test_reading_pairs_leaves_the_generator_as_it_was(run):
    loader = run(erase=1.0)[0]
    torch.manual_seed(3)
    expected = torch.rand(3)
    for start in (0, 2):
        torch.manual_seed(3)
        loader.dataset[(0, start)]
        assert torch.equal(torch.rand(3), expected)


def test_each_template_wraps_as_many_captions(run):
    batches = list(run(caption_templates=["a: {}", "the: {}"], epochs=20)[0])
    drawn = [text.partition(" caption ")[0] for batch in batches for text in read(batch["tokens"])]
    assert set(drawn) == {"a:", "the:"} and 0.3 < drawn.count("a:") / len(drawn) < 0.7


def test_braces_in_a_caption_stay(tmp_path, run):
    samples = {str(n): {"jpg": JPG, "txt": b"{} and {0} {x}"} for n in range(2)}
    (batch,) = run(samples, batch_size=2, epochs=1, caption_templates=["say {}"])[0]
    assert read(batch["tokens"]) == ["say {} and {0} {x}"] * 2


def test_without_prompts_each_caption_comes_with_its_negation(run):
    templates = ["a photo of a {}", "a drawing of the {}", "{}"]
    twins = {"a photo of a": "a photo of no", "a drawing of the": "a drawing of no", "": "no"}
    seen = set()
    for batch in run(num_prompts=0, caption_templates=templates, epochs=6)[0]:
        for yes, no in zip(read(batch["tokens"]), read(batch["no_tokens"]), strict=True):
            template, _, caption = yes.rpartition("caption")
            seen.add(template.strip())
            assert no == f"{twins[template.strip()]} caption{caption}"
    assert seen == set(twins)


def test_plain_clip_needs_no_negation(run):
    assert all("no_tokens" not in batch for batch in run(num_prompts=0, objective="clip")[0])


# Broken pairs


def broken(samples: dict, *numbers: int, part: str = "jpg", content: bytes = b"no image") -> dict:
    for number in numbers:
        samples[f"{number:05d}"][part] = content
    return samples


@pytest.mark.parametrize(
    "part, content, cause",
    [
        ("jpg", b"no image", "broken image"),
        ("jpg", b"", "empty image file"),
        ("jpg", JPG[:300], "broken image"),
        ("jpg", HUGE, "huge image"),
        ("txt", b"", "empty caption"),
        ("txt", b" \n", "empty caption"),
        ("txt", b"\xff\xfe", "caption not in UTF-8"),
        ("txt", b"a" * 20_000, "caption too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_pair_is_replaced_by_another_and_counted(run, caplog, part, content, cause):
    (batch,) = run(broken(numbered_samples(10), 3, 4, part=part, content=content), batch_size=10, epochs=1)[0]
    assert numbers([batch]) == batch["number"].tolist() and set(numbers([batch])) >= {0, 1, 2, 5, 6, 7, 8, 9}
    times = batch["skipped"].sum(dim=1)
    assert (times > 0).sum() == 2 and times.sum() == batch["skipped"].sum(dim=0)[CAUSES.index(cause)]
    assert f"skipped {run.path}" in messages(caplog) and cause in messages(caplog)


def test_replacements_depend_on_the_epoch_and_not_on_the_worker(run):
    samples = broken(numbered_samples(30), *range(15))
    first, second = list(run(samples, batch_size=30)[0])
    assert_same_batches(list(run(batch_size=30, workers=2)[0]), [first, second])
    assert sorted(first["number"].tolist()) != sorted(second["number"].tolist())
    assert min(numbers([first, second])) >= 15 and (first["skipped"].sum(dim=1) > 0).sum() == 15


def test_a_missing_image_of_a_table_is_replaced(tmp_path, run):
    write_images(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "x.csv").write_text("filepath,title\n0.png,n 0\ngone.png,n 1\n1.png,\n2.png,n 3\n")
    (batch,) = run(shards=str(tmp_path / "x.csv"), batch_size=4, epochs=1)[0]
    assert set(numbers([batch])) == {0, 3}
    causes = dict(zip(CAUSES, batch["skipped"].sum(dim=0).tolist(), strict=True))
    assert causes["empty caption"] >= 1 and causes["unreadable file"] >= 1


def test_too_many_broken_pairs_in_a_row_end_training(run):
    with pytest.raises(ValueError, match=r"pairs in a row are bad, drawn at random after .*run\.tar"):
        list(run(broken(numbered_samples(40), *range(40)), batch_size=4)[0])


# Sizes that do not fit


@pytest.mark.parametrize("num_pairs, expected", [(8, 2), (5, 1)])
def test_num_pairs_shortens_the_epoch(run, num_pairs, expected):
    loader, steps = run(num_pairs=num_pairs, batch_size=4)
    assert (steps, len(loader)) == (expected, 2 * expected)


@pytest.mark.parametrize(
    "ranks, sizes, message",
    [
        (1, {"num_pairs": 11}, r"data\.num_pairs=11: there are only 10 pairs"),
        (1, {"batch_size": 11}, r"train\.batch_size=11: an epoch has only 10 pairs"),
        (1, {"batch_size": 8, "num_pairs": 7}, r"train\.batch_size=8: an epoch has only 7 pairs"),
        (3, {"batch_size": 4}, r"train\.batch_size=4 cannot be shared equally by 3 ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_reported(run, monkeypatch, ranks, sizes, message):
    monkeypatch.setattr(clipn.data.pairs, "world_size", lambda: ranks)
    with pytest.raises(ValueError, match=message):
        run(**sizes)
