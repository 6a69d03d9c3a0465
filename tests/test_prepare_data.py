"""scripts/prepare_data.py: fetching, unpacking and checking known sets, from small archives of this machine."""

import io
import tarfile

import numpy as np
import pytest
from helpers import files, image_bytes, md5, write_images, write_tar, write_zip

from clipn.data.image_sets import open_image_set
from clipn.data.known_sets import KNOWN_SETS
from scripts.prepare_data import download, main, prepare, unpack

PICTURE = image_bytes()
MEMBERS = {f"wrap/set/{name}/{n}.jpg": PICTURE for name in ("a", "b") for n in (1, 2)}


# Downloads


def test_a_file_is_fetched_and_checked(web, tmp_path):
    folder, address = web
    (folder / "a.bin").write_bytes(b"x" * 3_000_000)
    download(f"{address}/a.bin", tmp_path / "new" / "a.bin", md5(folder / "a.bin"))
    assert md5(tmp_path / "new" / "a.bin") == md5(folder / "a.bin")


@pytest.mark.parametrize(
    ("name", "checksum", "message"),
    [
        ("a.tar", "0" * 32, r"a\.tar: not the published file: its MD5 is \w+, expected 000"),
        ("short.tar", None, r"short\.tar: .*(ended after|IncompleteRead)"),
        ("gone.tar", None, r"gone\.tar: .*404"),
    ],
)
def test_a_failed_download_leaves_nothing(web, tmp_path, name, checksum, message):
    folder, address = web
    for file in ("a.tar", "short.tar"):
        (folder / file).write_bytes(b"content")
    with pytest.raises((OSError, ValueError), match=message):
        download(f"{address}/{name}", tmp_path / "new" / name, checksum)
    assert files(tmp_path / "new") == []


def test_no_server_is_an_error_with_the_address(tmp_path):
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9/a\.tar"):
        download("http://127.0.0.1:9/a.tar", tmp_path / "a.tar")


# Archives


def test_tar_and_zip_are_unpacked_without_what_a_mac_adds(tmp_path):
    for archive in (
        write_tar(tmp_path / "a.tar", MEMBERS),
        write_zip(tmp_path / "a.zip", MEMBERS | {"__MACOSX/._1.jpg": b""}),
    ):
        unpack(archive, tmp_path / archive.suffix)
        found = [path.relative_to(tmp_path / archive.suffix) for path in (tmp_path / archive.suffix).rglob("*.jpg")]
        assert sorted(map(str, found)) == sorted(MEMBERS)


def write_link(path, target):
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, target
        archive.addfile(link)
        inside = tarfile.TarInfo("link/evil.txt")
        inside.size = 1
        archive.addfile(inside, io.BytesIO(b"x"))
    return path


def test_an_archive_that_reaches_outside_is_refused(tmp_path):
    bad = [
        write_tar(tmp_path / "up.tar", {"../../evil.txt": b"x"}),
        write_zip(tmp_path / "up.zip", {"../../evil.txt": b"x"}),
        write_zip(tmp_path / "root.zip", {f"{tmp_path}/evil.txt": b"x"}),
        write_link(tmp_path / "link.tar", str(tmp_path)),
    ]
    for archive in bad:
        with pytest.raises(ValueError, match=archive.name):
            unpack(archive, tmp_path / "deep" / "er")
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("name", ["page.tar.gz", "cut.tar.gz", "cut.zip"])
def test_a_broken_archive_says_so(tmp_path, name):
    if name == "page.tar.gz":
        (tmp_path / name).write_bytes(b"<html>please log in</html>")
    else:
        write_zip(tmp_path / name, MEMBERS)
        if name == "cut.tar.gz":
            with tarfile.open(tmp_path / name, "w:gz") as archive:
                noise = tarfile.TarInfo("noise")
                noise.size = 100_000
                archive.addfile(noise, io.BytesIO(np.random.default_rng(0).bytes(100_000)))
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name}: no whole tar or zip file, delete it"):
        unpack(tmp_path / name, tmp_path / "out")


# A set, from its address to its folder


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_set_is_fetched_unpacked_checked_and_put_in_its_place(known, web, tmp_path, kind):
    folder, address = web
    archive = {"tar": write_tar, "zip": write_zip}[kind](folder / f"small.{kind}", MEMBERS | {"wrap/readme.txt": b"?"})
    known("small", archive=archive.name, url=f"{address}/{archive.name}", md5=md5(archive), inside="wrap/set")
    prepare("small", tmp_path / "data")
    images = open_image_set("small", tmp_path / "data" / "sets" / "small")
    assert (images.classes, len(images)) == (["a", "b"], 4)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["downloads", "sets"], "no leftovers"
    archive.unlink()
    prepare("small", tmp_path / "data")  # again: nothing to fetch


def test_a_file_address_will_do(known, tmp_path):
    archive = write_tar(tmp_path / "small.tar", {name.removeprefix("wrap/set/"): PICTURE for name in MEMBERS})
    known("small", archive="small.tar", url=archive.as_uri(), inside="no such folder in it")
    prepare("small", tmp_path / "data")
    assert len(open_image_set("small", tmp_path / "data" / "sets" / "small")) == 4


def test_an_archive_put_there_by_hand_is_taken(known, tmp_path):
    known("small", archive="small.tar", inside="wrap/set", terms="registration")
    with pytest.raises(
        FileNotFoundError, match=r"downloads/small\.tar; get it from https://example.org/small \(registr"
    ):
        prepare("small", tmp_path)
    write_tar(tmp_path / "downloads.tar", MEMBERS)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads.tar").rename(tmp_path / "downloads" / "small.tar")
    prepare("small", tmp_path)
    assert len(open_image_set("small", tmp_path / "sets" / "small")) == 4


def test_another_archive_by_hand_is_refused(known, tmp_path):
    known("small", archive="small.tar", md5="0" * 32)
    (tmp_path / "downloads").mkdir()
    write_tar(tmp_path / "downloads" / "small.tar", MEMBERS)
    with pytest.raises(ValueError, match=r"small\.tar: not the published file"):
        prepare("small", tmp_path)
    assert not (tmp_path / "sets").exists()


def test_half_a_set_is_not_called_ready(known, tmp_path):
    known("small", archive="small.tar", inside="wrap/set")
    write_images(tmp_path / "sets" / "small", "a/1.jpg", "b/1.jpg")
    with pytest.raises(ValueError, match=r"found 2 images in 2 class folders.*is 4 images in 2.*move .*small away"):
        prepare("small", tmp_path)


def test_the_command_prints_what_is_missing_and_where_to_get_it(known, web, tmp_path, capsys):
    folder, address = web
    archive = write_tar(folder / "small.tar", MEMBERS)
    known("small", archive="small.tar", url=f"{address}/{archive.name}", inside="wrap/set")
    known("other", archive="other.zip", folder="other", terms="ask them")
    with pytest.raises(ValueError, match="not ready: other$"):
        main(["other", "small", "--root", str(tmp_path)])
    out, err = capsys.readouterr()
    assert out == f"small: ready in {tmp_path}/sets/small\n", "one failure does not stop the others"
    for part in (
        f"{tmp_path}/downloads/other.zip",
        "https://example.org/small",
        "ask them",
        f"{tmp_path}/other/a/<image>",
    ):
        assert part in err, part


def test_the_list_shows_every_set_and_makes_nothing(tmp_path, capsys):
    main(["--list", "--root", str(tmp_path / "data")])
    shown = capsys.readouterr().out
    for name, known in KNOWN_SETS.items():
        assert f"{name}: {known.title}\n" in shown and f"{known.images}, {known.layout}" in shown
    assert not (tmp_path / "data").exists()


def test_an_unknown_set_is_told_before_anything_is_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"'svnh'.*svhn"):
        main(["textures", "svnh", "--root", str(tmp_path)])
    assert not list(tmp_path.iterdir())
