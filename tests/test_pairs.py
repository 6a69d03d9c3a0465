"""Image-caption pairs: what is read, in which order, and what happens to broken ones."""

import json
import logging
import os
import tarfile

import pytest
import torch
from helpers import image_bytes, jpeg_bytes, numbered_samples, read, spell, write_images, write_shard, write_tar

import clipn.pairs
import clipn.shard_index
from clipn.config import Config, DataConfig
from clipn.images import default_preprocess
from clipn.pairs import EpochBatches, ShardPairs, expand_patterns, open_pairs, training_loader
from clipn.shard_index import index_shards, scan_shard

JPG = jpeg_bytes()


@pytest.fixture
def settings(tmp_path):
    """Data settings that remember indexes in the test's own folder."""

    def _settings(shards, **more) -> DataConfig:
        shards = [str(s) for s in shards] if isinstance(shards, list) else str(shards)
        return DataConfig(shards=shards, index_dir=str(tmp_path / "index"), workers=more.pop("workers", 0), **more)

    return _settings


def captions(pairs) -> list[str]:
    return [pairs[n].caption for n in range(len(pairs))]


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# Shards


def test_images_of_every_kind_and_their_captions(tmp_path, settings):
    images = {"a.jpg": jpeg_bytes(), "b.png": image_bytes(kind="PNG"), "c.webp": image_bytes(kind="WEBP")}
    images |= {"d.JPEG": jpeg_bytes((1, 2, 3))}
    members = {}
    for name, content in images.items():
        members |= {name: content, f"{name[0]}.txt": f"un café {name[0]}".encode()}
    pairs = open_pairs(settings(write_tar(tmp_path / "x.tar", members)))
    assert [pairs[n].image for n in range(len(pairs))] == list(images.values())
    assert captions(pairs) == ["un café a", "un café b", "un café c", "un café d"]


def test_shards_follow_each_other(tmp_path, settings):
    paths = [write_shard(tmp_path / f"{n}.tar", numbered_samples(3, 3 * n)) for n in range(3)]
    assert captions(open_pairs(settings(paths))) == [f"caption {n}" for n in range(9)]
    assert captions(open_pairs(settings(paths[::-1])))[0] == "caption 6"


def test_members_of_a_sample_need_not_be_neighbours(tmp_path, settings):
    members = {"2.txt": b"two", "1.jpg": JPG, "notes.md": b"?", "2.jpg": jpeg_bytes((0, 0, 9)), "1.txt": b"one"}
    pairs = open_pairs(settings(write_tar(tmp_path / "x.tar", members)))
    assert {pairs[n].caption: pairs[n].image for n in range(len(pairs))} == {"one": JPG, "two": jpeg_bytes((0, 0, 9))}


def test_equal_names_in_different_folders_are_different_samples(tmp_path, settings):
    members = {"p/1.jpg": JPG, "q/1.jpg": JPG, "q/1.txt": b"in q", "p/1.txt": b"in p"}
    assert captions(open_pairs(settings(write_tar(tmp_path / "x.tar", members)))) == ["in p", "in q"]


def test_a_sample_without_image_or_caption_is_left_out_with_a_warning(tmp_path):
    members = {"1.jpg": JPG, "2.jpg": JPG, "2.txt": b"two", "3.txt": b"three"}
    assert captions(ShardPairs([write_tar(tmp_path / "x.tar", members)], index_dir=str(tmp_path))) == ["two"]


def test_txt_comes_before_json_unless_a_key_is_asked_for(tmp_path, settings):
    record = {"caption": "from json", "alt": "other words", "width": 3}
    members = {"1.jpg": JPG, "1.txt": b"from txt", "1.json": json.dumps(record).encode()}
    path = write_tar(tmp_path / "x.tar", members)
    assert captions(open_pairs(settings(path))) == ["from txt"]
    assert captions(open_pairs(settings(path, caption_key="caption"))) == ["from json"]
    assert captions(open_pairs(settings(path, caption_key="alt"))) == ["other words"]


def test_json_alone_gives_its_caption(tmp_path, settings):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPG, "1.json": b'{"caption": "hello"}'})
    assert captions(open_pairs(settings(path))) == ["hello"]


def test_a_missing_caption_key_is_told_with_the_keys_there_are(tmp_path, settings):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPG, "1.json": b'{"caption": "hello", "width": 3}'})
    for key in ("text", "width"):
        with pytest.raises(ValueError, match="caption, width") as error:
            open_pairs(settings(path, caption_key=key))
        assert repr(key) in str(error.value) and str(path) in str(error.value)


def test_a_caption_key_without_json_is_told(tmp_path, settings):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    with pytest.raises(ValueError, match=r"data\.caption_key='caption'") as error:
        open_pairs(settings(path, caption_key="caption"))
    assert str(path) in str(error.value)


def test_a_truncated_shard_keeps_its_whole_samples(tmp_path, settings, caplog):
    whole = write_shard(tmp_path / "whole.tar", numbered_samples(5))
    with tarfile.open(whole) as archive:
        last_image = archive.getmember("00004.jpg")
    for name, size in {"in_data": last_image.offset_data + 100, "in_header": last_image.offset + 100}.items():
        cut = tmp_path / f"{name}.tar"
        cut.write_bytes(whole.read_bytes()[:size])
        pairs = open_pairs(settings(cut))
        assert captions(pairs) == [f"caption {n}" for n in range(4)]
        assert pairs[3].image == open_pairs(settings(whole))[3].image


def test_a_truncated_shard_is_told(tmp_path, caplog):
    whole = write_shard(tmp_path / "whole.tar", numbered_samples(5))
    with tarfile.open(whole) as archive:
        caption = archive.getmember("00003.txt")
    whole.write_bytes(whole.read_bytes()[: caption.offset_data + 2])
    table = scan_shard(whole)
    assert table.shape[1] == 3
    assert str(whole) in messages(caplog) and "truncated" in messages(caplog)


def test_a_shard_without_pairs_is_named(tmp_path, settings):
    empty = write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match=r"empty\.tar.*jpg"):
        open_pairs(settings(empty))
    texts = write_tar(tmp_path / "texts.tar", {"1.txt": b"alone"})
    with pytest.raises(ValueError, match=r"texts\.tar"):
        open_pairs(settings(texts))


def test_one_empty_shard_among_others_is_warned_of(tmp_path, settings, caplog):
    paths = [write_tar(tmp_path / "empty.tar", {}), write_shard(tmp_path / "x.tar", numbered_samples(2))]
    pairs = open_pairs(settings(paths))
    assert captions(pairs) == ["caption 0", "caption 1"]
    assert "empty.tar" in messages(caplog)
    assert "x.tar" in pairs.name(0)


def test_what_is_no_tar_is_named(tmp_path, settings):
    path = tmp_path / "page.tar"
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"page\.tar.*not an uncompressed tar"):
        open_pairs(settings(path))


def test_a_file_of_no_bytes_is_named(tmp_path, settings):
    path = tmp_path / "nothing.tar"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"nothing\.tar"):
        open_pairs(settings(path))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused(tmp_path, settings, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(write_images(tmp_path / "folder", "1.png"), "folder")
    with pytest.raises(ValueError, match=r"x\.tar.*uncompressed"):
        open_pairs(settings(path))


def test_sizes_json_is_compared(tmp_path, settings, caplog):
    paths = [write_shard(tmp_path / f"{n}.tar", numbered_samples(3)) for n in range(2)]
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 3}))
    open_pairs(settings(paths))
    assert not messages(caplog)
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 1000, "2.tar": 5}))
    assert len(open_pairs(settings(paths))) == 6
    assert "1.tar: holds 3 pairs, sizes.json says 1000" in messages(caplog)
    assert "0.tar" not in messages(caplog)


# The remembered index


@pytest.fixture
def no_scan(monkeypatch):
    """From here on, reading a tar's headers is an error."""

    def refuse():
        def _scan(path):
            raise AssertionError(f"{path} was scanned again")

        monkeypatch.setattr(clipn.shard_index, "scan_shard", _scan)

        class _Inline:
            def __init__(self, *_):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def map(self, function, items):
                return map(function, items)

        monkeypatch.setattr(clipn.shard_index, "ProcessPoolExecutor", _Inline)

    return refuse


def test_the_index_is_remembered(tmp_path, settings, no_scan):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    first = open_pairs(settings(path))
    no_scan()
    second = open_pairs(settings(path))
    assert [second[n] for n in range(4)] == [first[n] for n in range(4)]


def test_another_choice_of_caption_needs_no_new_scan(tmp_path, settings, no_scan):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPG, "1.txt": b"from txt", "1.json": b'{"caption": "from json"}'})
    open_pairs(settings(path))
    no_scan()
    assert captions(open_pairs(settings(path, caption_key="caption"))) == ["from json"]


def test_the_index_is_forgotten_when_the_file_changes(tmp_path, settings, no_scan):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    before = path.stat()
    open_pairs(settings(path))
    write_shard(path, numbered_samples(4, first=10))
    assert path.stat().st_size == before.st_size, "the same size: only the time tells"
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert captions(open_pairs(settings(path)))[0] == "caption 10"
    write_shard(path, numbered_samples(40))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(open_pairs(settings(path))) == 40, "another size: only the size tells"
    no_scan()
    other = path.rename(tmp_path / "moved.tar")
    with pytest.raises(AssertionError, match="moved"):
        open_pairs(settings(other))


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path, caplog):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    (tmp_path / "file").write_text("in the way")
    assert len(index_shards([path], "txt", str(tmp_path / "file"))) == 2
    assert "could not be remembered" in messages(caplog)


def test_a_broken_memory_is_read_anew(tmp_path, settings):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    open_pairs(settings(path))
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert len(open_pairs(settings(path))) == 2


# Patterns


def test_braces_count_and_list_in_order(tmp_path):
    for name in ("train-008.tar", "train-009.tar", "train-010.tar", "val-009.tar", "val-010.tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [path.name for path in expand_patterns(str(tmp_path / pattern))]

    assert names("train-{008..010}.tar") == ["train-008.tar", "train-009.tar", "train-010.tar"]
    assert names("{val,train}-010.tar") == ["val-010.tar", "train-010.tar"]
    assert names("{train,val}-{009..010}.tar") == ["train-009.tar", "train-010.tar", "val-009.tar", "val-010.tar"]
    assert names("train-*.tar") == ["train-008.tar", "train-009.tar", "train-010.tar"]
    assert names("{val,train}-0?0.tar") == ["val-010.tar", "train-010.tar"]
    assert names("val-010.tar") == ["val-010.tar"]


def test_a_list_of_patterns_keeps_its_order(tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    patterns = [str(tmp_path / "c"), str(tmp_path / "{a,b}")]
    assert [path.name for path in expand_patterns(patterns)] == ["c", "a", "b"]


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"data\.shards=.*\{0\.\.2\}.*1\.tar$"):
        expand_patterns(str(tmp_path / "{0..2}.tar"))
    for nothing in (str(tmp_path / "x*.tar"), str(tmp_path), "", []):
        with pytest.raises(FileNotFoundError, match=r"data\.shards"):
            expand_patterns(nothing)


# Tables


def test_a_csv_with_paths_beside_it(tmp_path, settings):
    write_images(tmp_path / "images", "1.png", "2.png")
    (tmp_path / "pairs.csv").write_text(
        'filepath,title,extra\nimages/1.png,"a cat, asleep, ""so it says""",x\nimages/2.png,NA,y\n', encoding="utf-8"
    )
    pairs = open_pairs(settings(tmp_path / "pairs.csv"))
    assert captions(pairs) == ['a cat, asleep, "so it says"', "NA"]
    assert pairs[0].image == (tmp_path / "images" / "1.png").read_bytes()


def test_a_tsv_with_its_own_columns_and_absolute_paths(tmp_path, settings):
    image = write_images(tmp_path / "else where", "é.png") / "é.png"
    table = tmp_path / "sub" / "pairs.tsv"
    table.parent.mkdir()
    table.write_text(f"text\tfile\na dog, running\t{image}\n", encoding="utf-8")
    pairs = open_pairs(settings(table, image_column="file", caption_column="text"))
    assert (pairs[0].caption, pairs[0].image) == ("a dog, running", image.read_bytes())


def test_a_quote_without_an_end_is_told_with_the_file(tmp_path, settings):
    (tmp_path / "x.tsv").write_text('filepath\ttitle\n1.png\t"no end\n2.png\ttwo\n')
    with pytest.raises(ValueError, match=r"x\.tsv: not a readable table"):
        open_pairs(settings(tmp_path / "x.tsv"))


@pytest.mark.parametrize("rows", ["1.png,a cat, asleep\n2.png,two\n", "1.png,one\n2.png,a cat, asleep\n"])
def test_a_comma_without_quotes_never_shifts_the_columns(tmp_path, settings, rows):
    (tmp_path / "x.csv").write_text(f"filepath,title\n{rows}")
    with pytest.raises(ValueError, match=r"x\.csv"):
        open_pairs(settings(tmp_path / "x.csv"))


def test_a_missing_column_is_named_with_those_there_are(tmp_path, settings):
    (tmp_path / "x.csv").write_text("file,title\na.png,b\n")
    with pytest.raises(ValueError, match=r"x\.csv.*'filepath'.*data\.image_column.*file, title"):
        open_pairs(settings(tmp_path / "x.csv"))
    with pytest.raises(ValueError, match=r"'text'.*data\.caption_column"):
        open_pairs(settings(tmp_path / "x.csv", image_column="file", caption_column="text"))


@pytest.mark.parametrize("text", ["", "\n", "filepath,title\n"])
def test_a_table_without_rows_is_named(tmp_path, settings, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=r"x\.csv"):
        open_pairs(settings(tmp_path / "x.csv"))


def test_a_table_and_something_else_are_refused(tmp_path, settings):
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
    assert order(epochs=2) == first, "not on what was drawn before"


def test_what_is_left_after_the_last_whole_batch_waits_for_another_epoch():
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


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6])
def test_starting_late_is_skipping(start):
    batches = EpochBatches(10, 10, 3, 2, 0, start)
    assert list(batches) == order(epochs=2)[start:]
    assert len(batches) == len(list(batches)) == 6 - start


def test_the_length_is_the_number_of_batches():
    for num_pairs, batch_size, epochs in [(10, 3, 2), (12, 4, 1), (7, 7, 3)]:
        batches = EpochBatches(num_pairs, 20, batch_size, epochs, 0, 0)
        assert len(batches) == len(list(batches))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batch_of_one_process(monkeypatch, ranks):
    alone = order(num_pairs=26, available=26, batch_size=6, epochs=2, start=1)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(clipn.pairs, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(clipn.pairs, "world_size", lambda: ranks)
        shares.append(order(num_pairs=26, available=26, batch_size=6, epochs=2, start=1))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == alone
    assert all(len(part) == 6 // ranks for share in shares for part in share)


# What training gets


@pytest.fixture
def run(tmp_path):
    """A config over a shard of the given samples, and its loader."""

    def _run(samples=None, start=0, batch_size=4, epochs=2, objective="clipn", num_prompts=16, **data):
        path = tmp_path / "run.tar"
        if not path.exists():
            write_shard(path, numbered_samples(10) if samples is None else samples)
        config = Config()
        config.data = DataConfig(**{"shards": str(path), "index_dir": str(tmp_path / "index"), "workers": 0} | data)
        config.run.device, config.model.num_prompts = "cpu", num_prompts
        config.train.batch_size, config.train.epochs, config.train.objective = batch_size, epochs, objective
        return training_loader(config, open_pairs(config.data), default_preprocess(16), spell, start)

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
        assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.float32
        assert batch["skipped"].tolist() == [0] * 4
        assert "no_tokens" not in batch


def test_image_and_caption_stay_together(run):
    preprocess = default_preprocess(16)
    mean, std = torch.tensor(preprocess["mean"]), torch.tensor(preprocess["std"])
    for batch in run()[0]:
        colours = 255 * (batch["image"].mean(dim=(2, 3)) * std + mean)
        for colour, number in zip(colours, numbers([batch]), strict=True):
            expected = torch.tensor([2.0 * number, number, 255 - number])
            assert torch.allclose(colour, expected, atol=3), "JPEG rounds a little"


def test_samples_are_the_same_for_any_number_of_workers(run):
    draws = {"crop_scale": [0.2, 1.0], "flip": 0.5, "color_jitter": 0.4, "erase": 0.5}
    templates = ["{}", "a {}", "the {}", "some {}"]
    alone = list(run(caption_templates=templates, **draws)[0])
    assert_same_batches(list(run(caption_templates=templates, workers=2, **draws)[0]), alone)


def test_a_later_start_gives_the_same_batches(run):
    templates = ["{}", "a {}", "the {}", "some {}"]
    whole = list(run(caption_templates=templates, erase=0.5)[0])
    assert_same_batches(list(run(start=1, caption_templates=templates, erase=0.5)[0]), whole[1:])
    assert_same_batches(list(run(start=2, caption_templates=templates, erase=0.5)[0]), whole[2:])


def test_an_image_is_cropped_anew_each_epoch(run, tmp_path):
    wide = {"erase": 1.0, "batch_size": 10, "epochs": 2}
    first, second = list(run(**wide)[0])
    by_number = {number: image for number, image in zip(numbers([first]), first["image"], strict=True)}
    again = [torch.equal(by_number[n], image) for n, image in zip(numbers([second]), second["image"], strict=True)]
    assert not all(again)


def test_reading_pairs_leaves_the_generator_as_it_was(run):
    loader = run(erase=1.0)[0]
    torch.manual_seed(3)
    expected = torch.rand(3)
    for start in (0, 2):
        torch.manual_seed(3)
        loader.dataset[(0, start)]
        assert torch.equal(torch.rand(3), expected)


def test_templates_wrap_the_caption(run):
    texts = [text for batch in run(caption_templates=["a photo: {}"])[0] for text in read(batch["tokens"])]
    assert all(text.startswith("a photo: caption ") for text in texts)
    batches = list(run(caption_templates=["a {}", "the {}"], epochs=20)[0])
    drawn = [text.split()[0] for batch in batches for text in read(batch["tokens"])]
    assert 0.3 < drawn.count("a") / len(drawn) < 0.7


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
    "part, content",
    [("jpg", b"no image"), ("jpg", b""), ("jpg", JPG[:300]), ("txt", b""), ("txt", b" \n"), ("txt", b"\xff\xfe")],
)
def test_a_broken_pair_is_replaced_by_the_next_and_counted(run, caplog, part, content):
    (batch,) = run(broken(numbered_samples(10), 3, 4, part=part, content=content), batch_size=10, epochs=1)[0]
    assert sorted(numbers([batch])) == sorted([0, 1, 2, 5, 5, 5, 6, 7, 8, 9])
    by_number = sorted(zip(numbers([batch]), batch["skipped"].tolist(), strict=True))
    assert [skipped for _, skipped in by_number if skipped] == [1, 2]
    assert all(number == 5 for number, skipped in by_number if skipped)
    assert "skipped" in messages(caplog) and "run.tar" in messages(caplog)


def test_the_pair_after_the_last_is_the_first(run):
    (batch,) = run(broken(numbered_samples(10), 9), batch_size=10, epochs=1)[0]
    assert sorted(numbers([batch])) == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_missing_image_of_a_table_is_replaced(tmp_path, run):
    write_images(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "x.csv").write_text("filepath,title\n0.png,n 0\ngone.png,n 1\n1.png,\n2.png,n 3\n")
    (batch,) = run(shards=str(tmp_path / "x.csv"), batch_size=4, epochs=1)[0]
    assert sorted(numbers([batch])) == [0, 3, 3, 3]
    assert sorted(batch["skipped"].tolist()) == [0, 0, 1, 2]


def test_too_many_broken_pairs_in_a_row_end_training(run, caplog):
    logging.getLogger("clipn").setLevel(logging.ERROR)
    try:
        with pytest.raises(ValueError, match=r"unreadable pairs in a row, from .*run\.tar"):
            list(run(broken(numbered_samples(40), *range(40)), batch_size=4)[0])
    finally:
        logging.getLogger("clipn").setLevel(logging.NOTSET)


# Sizes that do not fit


def test_num_pairs_shortens_the_epoch(run):
    loader, steps = run(num_pairs=8, batch_size=4)
    assert (steps, len(loader)) == (2, 4)
    assert run(num_pairs=5, batch_size=4)[1] == 1


def test_more_pairs_than_there_are_is_told(run):
    with pytest.raises(ValueError, match=r"data\.num_pairs=11: there are only 10 pairs"):
        run(num_pairs=11)


def test_a_batch_larger_than_the_epoch_is_told(run):
    for more in ({"batch_size": 11}, {"batch_size": 8, "num_pairs": 7}):
        with pytest.raises(ValueError, match=rf"train\.batch_size={more['batch_size']}: an epoch has only"):
            run(**more)


def test_a_batch_that_ranks_cannot_share_is_told(run, monkeypatch):
    monkeypatch.setattr(clipn.pairs, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"train\.batch_size=4 cannot be shared equally by 3 ranks"):
        run(batch_size=4)
