"""Webdataset shards: where their pairs are found, and that an index is cached."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers import captions, image_bytes, messages, numbered_samples, write_shard, write_tar

import clipn.data.shards
from clipn.data.pairs import open_pairs
from clipn.data.shards import BadPair, ShardPairs

JPG = image_bytes()


def indexed(path) -> ShardPairs:
    return ShardPairs([path], index_dir=str(path.parent / "index"))


def shard_of(tmp_path, members: dict[str, bytes]) -> ShardPairs:
    return indexed(write_tar(tmp_path / "x.tar", members))


# Samples and captions


def test_images_of_every_kind_and_their_captions(tmp_path):
    images = {"a.jpg": JPG, "b.png": image_bytes(kind="PNG"), "c.webp": image_bytes(kind="WEBP")}
    images |= {"d.JPEG": image_bytes((1, 2, 3))}
    pairs = shard_of(tmp_path, images | {f"{name[0]}.txt": f"un café {name[0]}".encode() for name in images})
    assert [pairs[n].image for n in range(len(pairs))] == list(images.values())
    assert captions(pairs) == ["un café a", "un café b", "un café c", "un café d"]


def test_shards_follow_each_other(tmp_path, settings, caplog):
    paths = [write_shard(tmp_path / f"{n}.tar", numbered_samples(3, 3 * n)) for n in range(2)]
    paths.insert(1, write_tar(tmp_path / "empty.tar", {}))
    pairs = open_pairs(settings(paths))
    assert captions(pairs) == [f"caption {n}" for n in range(6)]
    assert "empty.tar: no pair" in messages(caplog) and "1.tar" in pairs.name(3)
    assert captions(open_pairs(settings(paths[::-1])))[0] == "caption 3"


def test_a_sample_is_the_members_of_one_name_and_folder_wherever_they_are(tmp_path):
    blue = image_bytes((0, 0, 9))
    members = {"2.txt": b"two", "p/1.jpg": JPG, "notes.md": b"?", "2.jpg": blue, "q/1.jpg": blue, "q/1.txt": b"in q"}
    pairs = shard_of(tmp_path, members | {"p/1.txt": b"in p"})
    assert {tuple(pairs[n]) for n in range(len(pairs))} == {(blue, "two"), (JPG, "in p"), (blue, "in q")}


def test_a_sample_without_image_or_caption_is_left_out_with_a_warning(tmp_path, caplog):
    pairs = shard_of(tmp_path, {"1.jpg": JPG, "2.jpg": JPG, "2.txt": b"two", "3.txt": b"three"})
    assert captions(pairs) == ["two"] and pairs.faults == {"image or caption missing": 2}
    assert "x.tar: 2 image or caption missing; 1 pairs are used" in messages(caplog)


def test_the_first_of_duplicate_keys_counts(tmp_path, caplog):
    first = write_shard(tmp_path / "x.tar", numbered_samples(2))
    second = write_shard(tmp_path / "second.tar", {"00000": {"jpg": image_bytes((9, 9, 9)), "txt": b"again"}})
    content = first.read_bytes().rstrip(b"\0")
    first.write_bytes(content + bytes(-len(content) % 512) + second.read_bytes())
    pairs = indexed(first)
    assert captions(pairs) == ["caption 0", "caption 1"]
    assert pairs.faults == {"duplicate key": 2} and "2 duplicate key" in messages(caplog)


def test_shards_with_many_faults_are_refused(tmp_path, settings):
    path = write_shard(tmp_path / "x.tar", numbered_samples(30) | {"x": {"jpg": JPG}, "y": {"txt": b"y"}})
    with pytest.raises(ValueError, match=r"x\.tar'?: 2 of 32 pairs are bad \(2 image or caption missing\).*0\.05"):
        open_pairs(settings(path))
    assert len(open_pairs(settings(path, max_bad_fraction=0.1))) == 30


def test_txt_comes_before_json_unless_a_key_is_set(tmp_path, settings):
    record = {"caption": "from json", "alt": "other words", "width": 3}
    members = {"1.jpg": JPG, "1.txt": b"from txt", "1.json": json.dumps(record).encode()}
    path = write_tar(tmp_path / "x.tar", members)
    for key, caption in ((None, "from txt"), ("caption", "from json"), ("alt", "other words")):
        assert captions(open_pairs(settings(path, caption_key=key))) == [caption]
    assert captions(shard_of(tmp_path, {"1.jpg": JPG, "1.json": b'{"caption": "hello"}'})) == ["hello"]


@pytest.mark.parametrize(
    "members, key, message",
    [
        ({"1.json": b'{"caption": "hello", "width": 3}'}, "text", r"no text under 'text'.*caption, width"),
        ({"1.json": b'{"caption": "hello", "width": 3}'}, "width", r"no text under 'width'.*caption, width"),
        ({"1.txt": b"one"}, "caption", r"data\.caption_key='caption': there is no \.json"),
        ({"1.json": b'{"two\\nlines": 1, "\\ud800": 2}'}, None, "two.*lines"),
        ({"1.json": b"{"}, None, r"\.json is broken"),
        ({"1.json": b"[1]"}, None, "its keys are: 'list'"),
    ],
)
def test_a_missing_caption_is_reported_in_one_line_with_the_keys(tmp_path, settings, members, key, message):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPG} | members)
    with pytest.raises(ValueError, match=message) as error:
        open_pairs(settings(path, caption_key=key))
    assert str(path) in str(error.value) and len(str(error.value).encode().splitlines()) == 1


def test_half_a_character_in_a_json_caption_is_a_bad_pair(tmp_path):
    members = {"1.jpg": JPG, "1.json": b'{"caption": "\\ud800"}', "2.jpg": JPG, "2.txt": b"two"}
    pairs = shard_of(tmp_path, members)
    with pytest.raises(BadPair, match="caption not in UTF-8"):
        pairs[0]
    assert pairs[1].caption == "two"


# Damaged shards


@pytest.mark.parametrize("place", ["data", "header", "caption"])
def test_a_truncated_shard_keeps_its_complete_samples(tmp_path, place, caplog):
    path = write_shard(tmp_path / "x.tar", numbered_samples(5))
    with tarfile.open(path) as archive:
        image, caption = archive.getmember("00004.jpg"), archive.getmember("00004.txt")
    size = {"data": image.offset_data + 100, "header": image.offset + 100, "caption": caption.offset_data + 2}[place]
    path.write_bytes(path.read_bytes()[:size])
    pairs = indexed(path)
    assert captions(pairs) == [f"caption {n}" for n in range(4)]
    missing = {"image or caption missing": 1} if place == "caption" else {}
    assert pairs.faults == {"truncated shard": 1} | missing and f"{path}: 1 truncated shard" in messages(caplog)


def with_header(path, name: str, start: int, value: bytes, checksum: bool = True) -> None:
    """Write `value` at `start` of a member's header, and the checksum that fits."""
    with tarfile.open(path) as archive:
        place = archive.getmember(name).offset
    content = bytearray(path.read_bytes())
    content[place + start : place + start + len(value)] = value
    if checksum:
        content[place + 148 : place + 156] = b" " * 8
        content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    path.write_bytes(content)


@pytest.mark.parametrize("size", [-1024, -1, 2**62, 2**80])
@pytest.mark.parametrize("kind", [b"0", b"?"], ids=["file", "unknown"])
def test_a_member_of_impossible_size_ends_a_shard(tmp_path, size, kind):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    with_header(path, "00002.jpg", 156, kind)
    encoded = (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    with_header(path, "00002.jpg", 124, encoded)
    pairs = indexed(path)
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults["truncated shard"] == 1


@pytest.mark.parametrize("start", [0, 148], ids=["name", "checksum"])
def test_a_broken_header_ends_a_shard_with_a_warning(tmp_path, caplog, start):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    with_header(path, "00002.jpg", start, b"???", checksum=False)
    pairs = indexed(path)
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults == {"truncated shard": 1}
    assert "x.tar: 1 truncated shard; 2 pairs are used" in messages(caplog)


ODD = [{"GNU.sparse.map": "x"}, {"GNU.sparse.size": "9" * 5000}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}]


@pytest.mark.parametrize("headers", ODD, ids=lambda headers: next(iter(headers)))
def test_unreadable_extended_headers_end_a_shard(tmp_path, headers):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    odd = tarfile.TarInfo("2.jpg")
    odd.pax_headers, odd.size = headers, len(JPG)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(odd, io.BytesIO(JPG))
    pairs = indexed(path)
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults == {"truncated shard": 1}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(odd, io.BytesIO(JPG))
    with pytest.raises(ValueError, match=r"x\.tar: not an uncompressed tar file"):
        indexed(path)


def test_links_and_sparse_members_are_left_out(tmp_path):
    samples = numbered_samples(1) | {"a": {"jpg": JPG, "txt": b"sparse"}, "b": {"jpg": JPG, "txt": b""}}
    path = write_shard(tmp_path / "x.tar", samples | numbered_samples(1, 1))
    with_header(path, "a.txt", 156, tarfile.GNUTYPE_SPARSE)
    with_header(path, "b.txt", 156, tarfile.SYMTYPE)
    pairs = indexed(path)
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults == {"image or caption missing": 2}


@pytest.mark.parametrize("kind", ["empty", "texts", "page", "nothing", "gz", "bz2", "xz"])
def test_a_file_without_pairs_is_named(tmp_path, settings, kind):
    path = write_tar(tmp_path / "x.tar", {} if kind == "empty" else {"1.txt": b"alone"})
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress |= {"page": lambda content: b"<html>404</html>" * 100, "nothing": lambda content: b""}
    if kind in compress:
        path.write_bytes(compress[kind](path.read_bytes()))
    no_tar = kind in ("page", "gz", "bz2", "xz")
    with pytest.raises(ValueError, match=r"x\.tar: not an uncompressed tar" if no_tar else r"no pair.*x\.tar.*jpg"):
        open_pairs(settings(path))


def test_sizes_json_is_compared(tmp_path, settings, caplog):
    paths = [write_shard(tmp_path / f"{n}.tar", numbered_samples(3)) for n in range(2)]
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 3}))
    open_pairs(settings(paths))
    assert not messages(caplog)
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 1000, "2.tar": 5}))
    assert len(open_pairs(settings(paths))) == 6
    assert "1.tar: holds 3 pairs, sizes.json says 1000" in messages(caplog) and "0.tar" not in messages(caplog)


@pytest.mark.parametrize("content", [b"[1]", b'{"0.tar": ', b"\xff", b"[" * 100_000, b"3"], ids=lambda text: text[:4])
def test_a_broken_sizes_json_is_named(tmp_path, settings, content):
    (tmp_path / "sizes.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"sizes\.json: expected") as error:
        open_pairs(settings(write_shard(tmp_path / "0.tar", numbered_samples(2))))
    assert "\n" not in str(error.value)


# The cached index


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The names of the shards that are scanned."""
    names, scan = [], clipn.data.shards.scan_shard
    monkeypatch.setattr(clipn.data.shards, "scan_shard", lambda path: names.append(path.name) or scan(path))
    pool = nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(clipn.data.shards, "ProcessPoolExecutor", lambda *_, **__: pool)
    return names


def test_the_index_is_cached_for_any_choice_of_caption(tmp_path, settings, scans):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPG, "1.txt": b"from txt", "1.json": b'{"caption": "from json"}'})
    assert [open_pairs(settings(path))[0] for _ in range(2)] == [(JPG, "from txt")] * 2
    assert captions(open_pairs(settings(path, caption_key="caption"))) == ["from json"]
    assert scans == ["x.tar"]


def test_a_changed_or_moved_file_is_scanned_again(tmp_path, settings, scans):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    before = path.stat()
    open_pairs(settings(path))
    write_shard(path, numbered_samples(4, first=10))
    assert path.stat().st_size == before.st_size, "only the time differs"
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert captions(open_pairs(settings(path)))[0] == "caption 10"
    write_shard(path, numbered_samples(40))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(open_pairs(settings(path))) == 40, "only the size differs"
    open_pairs(settings(path.rename(tmp_path / "moved.tar")))
    assert scans == ["x.tar", "x.tar", "x.tar", "moved.tar"]


def test_a_broken_or_read_only_cache_is_ignored(tmp_path, caplog):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    indexed(path)
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert len(indexed(path)) == 2 and not messages(caplog)
    assert len(ShardPairs([path], index_dir=str(path))) == 2 and "could not be saved" in messages(caplog)
