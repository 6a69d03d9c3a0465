"""Webdataset shards: where their pairs are found, and that a scan is remembered."""

import io
import json
import os
import tarfile

import pytest
from helpers import captions, image_bytes, jpeg_bytes, messages, numbered_samples, write_images, write_shard, write_tar

import clipn.data.shards
from clipn.data.pairs import open_pairs
from clipn.data.shards import BadPair, ShardPairs, index_shards

JPG = jpeg_bytes()


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
    pairs = ShardPairs([write_tar(tmp_path / "x.tar", members)], index_dir=str(tmp_path))
    assert {pairs[n].caption: pairs[n].image for n in range(len(pairs))} == {"one": JPG, "two": jpeg_bytes((0, 0, 9))}


def test_equal_names_in_different_folders_are_different_samples(tmp_path, settings):
    members = {"p/1.jpg": JPG, "q/1.jpg": JPG, "q/1.txt": b"in q", "p/1.txt": b"in p"}
    assert captions(open_pairs(settings(write_tar(tmp_path / "x.tar", members)))) == ["in p", "in q"]


def test_a_sample_without_image_or_caption_is_left_out_with_a_warning(tmp_path, caplog):
    members = {"1.jpg": JPG, "2.jpg": JPG, "2.txt": b"two", "3.txt": b"three"}
    pairs = ShardPairs([write_tar(tmp_path / "x.tar", members)], index_dir=str(tmp_path))
    assert captions(pairs) == ["two"] and pairs.faults == {"image or caption missing": 2}
    assert "x.tar: 2 image or caption missing; 1 pairs are used" in messages(caplog)


def test_of_a_key_that_comes_twice_the_first_is_taken(tmp_path, caplog):
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    write_shard(first, numbered_samples(2))
    write_shard(second, {"00000": {"jpg": jpeg_bytes((9, 9, 9)), "txt": b"again"}})
    whole = first.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + second.read_bytes()
    (tmp_path / "x.tar").write_bytes(whole)
    pairs = ShardPairs([tmp_path / "x.tar"], index_dir=str(tmp_path))
    assert captions(pairs) == ["caption 0", "caption 1"]
    assert pairs.faults == {"duplicate key": 2} and "2 duplicate key" in messages(caplog)


def test_shards_of_many_faults_are_refused(tmp_path, settings):
    samples = numbered_samples(30) | {"x": {"jpg": JPG}, "y": {"txt": b"y"}}
    path = write_shard(tmp_path / "x.tar", samples)
    with pytest.raises(ValueError, match=r"x\.tar'?: 2 of 32 pairs are bad \(2 image or caption missing\).*0\.05"):
        open_pairs(settings(path))
    assert len(open_pairs(settings(path, max_bad_fraction=0.1))) == 30


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


def test_keys_of_any_text_are_told_in_one_line(tmp_path, settings):
    path = write_tar(tmp_path / "x.tar", {"1.jpg": JPG, "1.json": b'{"two\\nlines": 1, "\\ud800": 2}'})
    with pytest.raises(ValueError, match="two.*lines") as error:
        open_pairs(settings(path))
    assert str(error.value).encode().splitlines() == [str(error.value).encode()]


def test_half_a_character_in_a_json_caption_is_a_bad_pair(tmp_path, settings):
    members = {"1.jpg": JPG, "1.json": b'{"caption": "\\ud800"}', "2.jpg": JPG, "2.txt": b"two"}
    pairs = open_pairs(settings(write_tar(tmp_path / "x.tar", members)))
    with pytest.raises(BadPair, match="caption not in UTF-8"):
        pairs[0]
    assert pairs[1].caption == "two"


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
    index = index_shards([whole], "txt", str(tmp_path))
    assert (len(index), index.faults) == (3, {"truncated shard": 1, "image or caption missing": 1})
    assert f"{whole}: 1 truncated shard" in messages(caplog)


def with_header(path, name: str, start: int, value: bytes):
    """The tar with `value` at `start` of a member's header, and the checksum that fits."""
    with tarfile.open(path) as archive:
        place = archive.getmember(name).offset
    content = bytearray(path.read_bytes())
    content[place + start : place + start + len(value)] = value
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [-1024, -1, 2**62, 2**80])
@pytest.mark.parametrize("kind", [b"0", b"?"], ids=["file", "unknown"])
def test_a_member_of_impossible_size_is_where_a_shard_ends(tmp_path, size, kind):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    with_header(path, "00002.jpg", 156, kind)
    with_header(
        path, "00002.jpg", 124, (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    )
    pairs = ShardPairs([path], index_dir=str(tmp_path))
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults["truncated shard"] == 1


@pytest.mark.parametrize("start", [0, 148], ids=["name", "checksum"])
def test_a_broken_header_is_where_a_shard_ends_and_is_told(tmp_path, caplog, start):
    path = write_shard(tmp_path / "x.tar", numbered_samples(4))
    with tarfile.open(path) as archive:
        place = archive.getmember("00002.jpg").offset + start
    path.write_bytes(path.read_bytes()[:place] + b"???" + path.read_bytes()[place + 3 :])
    pairs = ShardPairs([path], index_dir=str(tmp_path))
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults == {"truncated shard": 1}
    assert "x.tar: 1 truncated shard; 2 pairs are used" in messages(caplog)


ODD = [{"GNU.sparse.map": "x"}, {"GNU.sparse.size": "9" * 5000}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}]


@pytest.mark.parametrize("headers", ODD, ids=lambda headers: next(iter(headers)))
def test_extended_headers_that_cannot_be_read_end_a_shard(tmp_path, settings, headers):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    odd = tarfile.TarInfo("2.jpg")
    odd.pax_headers, odd.size = headers, len(JPG)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(odd, io.BytesIO(JPG))
    pairs = ShardPairs([path], index_dir=str(tmp_path))
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults == {"truncated shard": 1}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(odd, io.BytesIO(JPG))
    with pytest.raises(ValueError, match=r"x\.tar: not an uncompressed tar file"):
        open_pairs(settings(path))


def test_links_and_sparse_members_are_left_out(tmp_path):
    samples = numbered_samples(1) | {"a": {"jpg": JPG, "txt": b"sparse"}, "b": {"jpg": JPG, "txt": b""}}
    path = write_shard(tmp_path / "x.tar", samples | numbered_samples(1, 1))
    with_header(path, "a.txt", 156, tarfile.GNUTYPE_SPARSE)
    with_header(path, "b.txt", 156, tarfile.SYMTYPE)
    pairs = ShardPairs([path], index_dir=str(tmp_path))
    assert captions(pairs) == ["caption 0", "caption 1"] and pairs.faults == {"image or caption missing": 2}


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


@pytest.mark.parametrize("content", [b"[1]", b'{"0.tar": ', b"\xff", b"[" * 100_000, b"3"], ids=lambda text: text[:4])
def test_a_broken_sizes_json_is_named(tmp_path, settings, content):
    (tmp_path / "sizes.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"sizes\.json: expected") as error:
        open_pairs(settings(write_shard(tmp_path / "0.tar", numbered_samples(2))))
    assert "\n" not in str(error.value)


# The remembered index


@pytest.fixture
def no_scan(monkeypatch):
    """From here on, reading a tar's headers is an error."""

    def refuse():
        def _scan(path):
            raise AssertionError(f"{path} was scanned again")

        monkeypatch.setattr(clipn.data.shards, "scan_shard", _scan)

        class _Inline:
            def __init__(self, *_):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def map(self, function, items):
                return map(function, items)

        monkeypatch.setattr(clipn.data.shards, "scan_pool", _Inline)

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
    assert "could not be saved" in messages(caplog)


def test_a_broken_memory_is_read_anew(tmp_path, settings):
    path = write_shard(tmp_path / "x.tar", numbered_samples(2))
    open_pairs(settings(path))
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert len(open_pairs(settings(path))) == 2
