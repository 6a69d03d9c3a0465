"""`clipn predict`: one row per image of a folder."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import write_clipn
from helpers import files, png_header
from PIL import Image

import clipn
from clipn.cli import main
from clipn.deploy.folders import Row

CLASSES = ["cat", "dog", "fire engine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_clipn(tmp_path_factory.mktemp("predict") / "clipn.pt")


@pytest.fixture
def photos(tmp_path):
    """Five images in folders, among files that are not images to classify."""
    folder = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.JPG", "sub/c.webp", "sub/deeper/d.bmp", "été.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    for name in ("notes.txt", ".hidden.png", "sub/table.csv", ".cache/e.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("words")
    return folder


@pytest.fixture
def run(checkpoint, tmp_path):
    """Runs `clipn predict` with these words; returns its exit code."""
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n\nfire engine\n")

    def _run(*words, classes=names, checkpoint=checkpoint):
        common = ["--classes", str(classes), "--checkpoint", str(checkpoint), "--device", "cpu"]
        try:
            main(["predict", *common, *map(str, words)])
        except SystemExit as stopped:
            return stopped.code
        return 0

    return _run


@pytest.fixture
def csv_file(tmp_path):
    return tmp_path / "new" / "out.csv"


def rows(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def names_of(path):
    return [row.file for row in rows(path)]


def test_each_image_is_a_row_with_the_detectors_result(run, checkpoint, photos, csv_file, capsys):
    within = [photos / "sub", photos / "a.png", photos]  # sources within others count once
    assert run(photos, *within, "--csv", csv_file, "--batch-size", 2) == 0
    names = ["a.png", "b.JPG", "été.png", "sub/c.webp", "sub/deeper/d.bmp"]
    assert names_of(csv_file) == [str(photos / name) for name in names]
    detector = clipn.Detector.from_pretrained(checkpoint, CLASSES, device="cpu")
    for row, result in zip(rows(csv_file), detector.predict(names_of(csv_file)), strict=True):
        assert (row.label, row.is_ood, row.error) == (result.label, str(result.is_ood), "")
        numbers = [float(row.score), float(row.p_yes), float(row.p_no)]
        assert numbers == pytest.approx([result.score, result.p_yes, result.p_no], rel=1e-3)
    printed = capsys.readouterr()
    assert "done: 5 images" in printed.err and str(csv_file) in printed.err and not printed.out


def test_without_a_csv_file_each_image_is_a_line(run, photos, capsys):
    (photos / "a.png").rename(photos / "two\nlines\x1b[31m.png")
    assert run(photos / "sub", photos) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 5 and "\x1b" not in out
    assert all(any(name in line for name in CLASSES) for line in out.splitlines())


def test_an_unreadable_image_is_a_row_with_its_error(run, photos, csv_file, capsys):
    (photos / "broken.jpg").write_text("these are words")
    (photos / "empty.png").write_bytes(b"")
    (photos / "huge.png").write_bytes(png_header(20_000, 10_000))
    assert run(photos, "--csv", csv_file) == 0
    failed = {os.path.basename(row.file): row for row in rows(csv_file) if row.error}
    assert failed.keys() == {"broken.jpg", "empty.png", "huge.png"}
    assert "unknown format" in failed["broken.jpg"].error and "200000000 pixels" in failed["huge.png"].error
    assert all(row.label == row.is_ood == row.score == "" for row in failed.values())
    printed = capsys.readouterr().err
    assert "8 images" in printed and "3 unreadable" in printed
    assert run(photos / "broken.jpg", photos / "a.png") == 0
    assert "broken.jpg: error: " in capsys.readouterr().out


def test_without_a_readable_image_it_fails(run, tmp_path, csv_file, capsys):
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_text("words")
    assert run(tmp_path, "--csv", csv_file) == 1
    assert "none of the 2 images can be read" in capsys.readouterr().err and len(rows(csv_file)) == 2


def test_ood_images_are_moved_and_their_rows_stay(run, checkpoint, photos, tmp_path, csv_file):
    run(photos, "--csv", csv_file)
    scores = {row.file: float(row.score) for row in rows(csv_file)}
    csv_file.unlink()
    ranked = sorted(scores, key=scores.get)
    cut = max((2, 3, 4), key=lambda n: scores[ranked[n]] / scores[ranked[n - 1]])  # not between near-tied scores
    id_images, moved, blocked, aside = tmp_path / "id", *ranked[:2], photos / "new" / "aside"
    id_images.mkdir()
    shutil.copy(ranked[cut], id_images)
    target = aside / os.path.relpath(blocked, photos)
    target.parent.mkdir(parents=True)
    target.write_text("mine")
    content = {name: Path(name).read_bytes() for name in ranked}
    words = [photos, "--calibrate", id_images, "--keep", 1, "--move-ood", aside, "--csv", csv_file]
    assert run(*words) == 0
    first = {row.file: row for row in rows(csv_file)}
    assert [first[name].is_ood for name in ranked] == ["True"] * cut + ["False"] * (5 - cut)
    assert (aside / os.path.relpath(moved, photos)).read_bytes() == content[moved] and not os.path.exists(moved)
    assert target.read_text() == "mine" and Path(blocked).read_bytes() == content[blocked]
    assert "not moved" in first[blocked].error and not first[moved].error
    assert all(os.path.exists(name) for name in ranked[cut:])
    assert run(*words) == 0
    second = {row.file: row for row in rows(csv_file)}
    assert len(rows(csv_file)) == 5 and second.keys() == first.keys() and second[moved] == first[moved]


def test_another_run_replaces_all_rows_but_those_of_moved_images(run, photos, csv_file):
    moved = Row("gone/moved.png", "cat", "True", "0.1", "0.2", "0.8", "")
    stale = [moved._replace(is_ood="False"), moved._replace(error="not moved: it is a link")]
    stale += [moved._replace(file=str(photos / name)) for name in ("a.png", "sub/c.webp")]
    csv_file.parent.mkdir()
    with open(csv_file, "w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *stale[:2], moved, *stale[2:], ["a line that was cut", "cat"]])
    csv_file.write_bytes(csv_file.read_bytes().rstrip())  # editors leave out the last line's end
    link = csv_file.with_name("link.csv")
    link.symlink_to(csv_file)
    assert run(photos / "sub", "--csv", link) == 0 and link.is_symlink()
    assert rows(csv_file)[0] == moved
    assert names_of(csv_file)[1:] == [str(photos / name) for name in ("sub/c.webp", "sub/deeper/d.bmp")]


def test_stopped_it_leaves_the_rows_so_far(run, photos, csv_file, monkeypatch, capsys):
    assert run(photos, "--csv", csv_file) == 0
    sizes, encode = [], clipn.CLIPN.encode_image

    def stop_at_third(self, images):
        sizes.append(len(images))
        if len(sizes) >= 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(clipn.CLIPN, "encode_image", stop_at_third)
    assert run(photos, "--csv", csv_file, "--batch-size", 2, classes="horse,cow") == 130
    assert "stopped: 4 images" in capsys.readouterr().err
    assert len(rows(csv_file)) == 4 and {row.label for row in rows(csv_file)} <= {"horse", "cow"}

    monkeypatch.setattr(clipn.CLIPN, "encode_text", stop_at_third)
    assert run(photos) == 130, "also while the classes are encoded"
    line = "interrupted; the same command starts again: clipn predict "
    assert line in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "clipn.runtime.console")
    monkeypatch.setattr(sys, "meta_path", [Mock(find_spec=Mock(side_effect=KeyboardInterrupt)), *sys.meta_path])
    assert run(photos) == 130, "also while PyTorch is imported"
    assert line in capsys.readouterr().err


def test_an_image_that_was_moved_as_the_run_was_stopped_has_its_row(run, photos, csv_file, tmp_path, monkeypatch):
    move = shutil.move

    def stop_after_move(source, target):
        move(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("clipn.deploy.folders.shutil.move", stop_after_move)
    assert run(photos, "--csv", csv_file, "--move-ood", tmp_path / "ood") == 130
    moved = [row for row in rows(csv_file) if not os.path.exists(row.file)]
    assert len(moved) == len([path for path in (tmp_path / "ood").rglob("*") if path.is_file()]) == 1


def test_a_name_that_is_not_text_and_a_link_that_leads_back(run, photos, csv_file, capsys):
    odd = os.fsencode(photos) + b"/odd\xff.png"
    shutil.copy(photos / "a.png", odd)
    (photos / "sub" / "back").symlink_to(photos)
    for _ in range(2):  # the second run replaces all rows
        assert run(photos, "--csv", csv_file) == 0
        assert len(rows(csv_file)) == 6 and os.fsdecode(odd) in names_of(csv_file)
    assert run(photos) == 0 and "odd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sources", "options", "words"),
    [
        (["nowhere"], {}, ["nowhere: no such folder or image"]),
        (["empty"], {}, ["no image there", ".jpg"]),
        (["texts"], {}, ["no image there"]),
        (None, {"classes": "missing.txt"}, ["--classes='missing.txt'", "no such file", "cat,dog"]),
        (None, {"classes": "none.txt"}, ["expected names, found none"]),
        (None, {"classes": ","}, ["expected names, found none"]),
        (None, {"checkpoint": "missing.pt"}, ["missing.pt"]),
        (None, {"method": "MCM"}, ["MCM decides only by a threshold", "CTW or ATD"]),
        (None, {"method": "Magic"}, ["method='Magic'", "CTW"]),
        (None, {"templates": "missing.txt"}, ["templates='missing.txt'", "simple"]),
        (None, {"calibrate": "texts"}, ["calibrate texts", "no image"]),
        (None, {"keep": "0.9"}, ["--keep=0.9", "--calibrate"]),
        (None, {"batch-size": "0"}, ["batch_size=0"]),
        (None, {"device": "tpu:x"}, ["device='tpu:x'"]),
        (None, {"move-ood": "photos"}, ["move-ood photos"]),
        (None, {"move-ood": "none.txt"}, ["move-ood none.txt"]),
        (None, {"csv": "photos/a.png"}, ["csv photos/a.png", "another file"]),
        (None, {"csv": "names.txt"}, ["csv names.txt", "another file"]),
        (None, {"csv": "photos"}, ["csv photos", "expected a file"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(run, photos, tmp_path, monkeypatch, capsys, sources, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("words")
    (tmp_path / "none.txt").write_text("\n\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    choices = {key: options.pop(key) for key in ("classes", "checkpoint") if key in options}
    assert run(*sources or ["photos"], *(f"--{key}={value}" for key, value in options.items()), **choices) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_links_are_not_moved(run, photos, tmp_path, csv_file, capsys):
    elsewhere = tmp_path / "elsewhere"
    photos.rename(elsewhere)
    photos.mkdir()
    (photos / "behind").symlink_to(elsewhere)
    (photos / "link.png").symlink_to(elsewhere / "a.png")
    assert run(photos, "--move-ood", tmp_path / "aside", "--csv", csv_file) == 0
    ood = [row for row in rows(csv_file) if row.is_ood == "True"]
    assert ood and all("a link" in row.error for row in ood)
    assert not files(tmp_path / "aside") and f"{len(ood)} not moved" in capsys.readouterr().err


def test_a_closed_pipe_ends_it_without_a_message(run, photos, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run(photos, "--batch-size", 1) == 1
    assert "rror" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["words", "one,", "list.json", "folders.json", "pipe"])
def test_class_names_come_from_words_files_and_pipes(run, photos, tmp_path, capsys, kind):
    (tmp_path / "list.json").write_text(json.dumps(["horse", "cow"]))
    (tmp_path / "folders.json").write_text(json.dumps({"n01": "horse, steed", "n02": "cow"}))
    reader, writer = os.pipe()
    os.write(writer, b"horse\ncow\n")
    os.close(writer)
    classes = {"words": "horse, cow", "one,": "horse,", "pipe": f"/dev/fd/{reader}"}.get(kind, tmp_path / kind)
    assert run(photos / "a.png", classes=classes) == 0
    os.close(reader)
    out = capsys.readouterr().out
    assert ("horse" in out or "cow" in out) and "steed" not in out
