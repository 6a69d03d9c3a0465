"""`clipn predict`: a folder of pictures, a row each."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_clipn
from helpers import files, png_header
from PIL import Image

import clipn
from clipn.cli import main
from clipn.deploy.folders import Row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_clipn(tmp_path_factory.mktemp("predict") / "clipn.pt")


@pytest.fixture
def photos(tmp_path):
    """Pictures in folders, and what lies about in such folders."""
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


def rows(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def test_a_row_for_each_picture_as_the_detector_says(run, checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "made" / "out.csv"
    assert run(photos, "--csv", out, "--batch-size", 2) == 0
    found = rows(out)
    names = ["a.png", "b.JPG", "été.png", "sub/c.webp", "sub/deeper/d.bmp"]
    assert [row.file for row in found] == [str(photos / name) for name in names]
    detector = clipn.Detector.from_pretrained(checkpoint, ["cat", "dog", "fire engine"], device="cpu")
    for row, result in zip(found, detector.predict([row.file for row in found]), strict=True):
        assert (row.label, row.is_ood, row.error) == (result.label, str(result.is_ood), "")
        numbers = [float(row.score), float(row.p_yes), float(row.p_no)]
        assert numbers == pytest.approx([result.score, result.p_yes, result.p_no], rel=1e-4)
    shown = capsys.readouterr()
    assert "done: 5 pictures" in shown.err and str(out) in shown.err and not shown.out


def test_without_a_file_each_picture_is_a_line(run, photos, capsys):
    assert run(photos / "sub", photos / "a.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith(f"{photos}/a.png: ")
    assert all(any(name in line for name in ("cat", "dog", "fire engine")) for line in lines)


def test_a_broken_picture_is_a_row_with_its_error(run, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_text("these are words")
    (photos / "empty.png").write_bytes(b"")
    (photos / "huge.png").write_bytes(png_header(20_000, 10_000))
    assert run(photos, "--csv", tmp_path / "out.csv") == 0
    errors = {os.path.basename(row.file): row.error for row in rows(tmp_path / "out.csv") if row.error}
    assert errors.keys() == {"broken.jpg", "empty.png", "huge.png"}
    assert "unknown format" in errors["broken.jpg"] and "200000000 pixels" in errors["huge.png"]
    assert all(row.label == row.is_ood == row.score == "" for row in rows(tmp_path / "out.csv") if row.error)
    assert "8 pictures" in (told := capsys.readouterr().err) and "3 unreadable" in told
    assert run(photos) == 0
    assert "broken.jpg: error: " in capsys.readouterr().out


def test_ood_pictures_are_moved_and_nothing_is_overwritten(run, checkpoint, photos, tmp_path):
    detector = clipn.Detector.from_pretrained(checkpoint, ["cat", "dog", "fire engine"], device="cpu")
    pictures = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".webp", ".bmp"))
    pictures = [path for path in pictures if not path.name.startswith(".") and ".cache" not in path.parts]
    scores = {path: detector.predict(path).score for path in pictures}
    ranked = sorted(scores, key=scores.get)
    known = tmp_path / "known"  # so that exactly the two that score lowest are OOD
    known.mkdir()
    shutil.copy(ranked[2], known / ranked[2].name)
    aside, out = photos / "aside", tmp_path / "out.csv"
    taken = aside / ranked[1].relative_to(photos)
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    before = {path: path.read_bytes() for path in pictures}
    words = [photos, "--calibrate", known, "--keep", 1, "--move-ood", aside, "--csv", out]
    assert run(*words) == 0
    assert (aside / ranked[0].relative_to(photos)).read_bytes() == before[ranked[0]] and not ranked[0].exists()
    assert taken.read_text() == "mine" and ranked[1].read_bytes() == before[ranked[1]]
    assert all(path.exists() for path in ranked[1:])
    found = {row.file: row for row in rows(out)}
    assert [found[str(path)].is_ood for path in ranked] == ["True"] * 2 + ["False"] * 3
    assert "not moved" in found[str(ranked[1])].error and not found[str(ranked[0])].error
    assert run(*words) == 0
    assert str(ranked[0]) not in {row.file for row in rows(out)}, "what was moved aside is not judged again"
    assert files(aside) == sorted({ranked[0].name, taken.name})


def test_a_name_that_is_no_text_and_a_link_that_leads_back(run, photos, tmp_path, capsys):
    odd = os.fsencode(photos) + b"/odd\xff.png"
    shutil.copy(photos / "a.png", odd)
    (photos / "sub" / "back").symlink_to(photos)
    assert run(photos, "--csv", tmp_path / "out.csv") == 0
    assert len(rows(tmp_path / "out.csv")) == 6 and os.fsdecode(odd) in {row.file for row in rows(tmp_path / "out.csv")}
    assert run(photos) == 0 and "odd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"places": ["nowhere"]}, ["nowhere: no such folder or picture"]),
        ({"places": ["empty"]}, ["no picture there", ".jpg"]),
        ({"places": ["texts"]}, ["no picture there"]),
        ({"classes": "missing.txt"}, ["--classes='missing.txt'", "no such file", "cat,dog"]),
        ({"classes": "none.txt"}, ["expected names, found none"]),
        ({"classes": ","}, ["expected names, found none"]),
        ({"checkpoint": "missing.pt"}, ["missing.pt"]),
        ({"options": ["--method", "MCM"]}, ["MCM decides only by a threshold", "CTW or ATD"]),
        ({"options": ["--method", "Magic"]}, ["method='Magic'", "CTW"]),
        ({"options": ["--templates", "missing.txt"]}, ["templates='missing.txt'", "simple"]),
        ({"options": ["--calibrate", "texts"]}, ["at least one"]),
        ({"options": ["--batch-size", "0"]}, ["batch_size=0"]),
        ({"options": ["--device", "tpu:x"]}, ["device='tpu:x'"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(run, photos, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("words")
    (tmp_path / "none.txt").write_text("\n\n")
    choices = {key: more[key] for key in ("classes", "checkpoint") if key in more}
    assert run(*more.get("places", [photos]), *more.get("options", []), **choices) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_a_folder_of_nothing_readable_fails(run, tmp_path, capsys):
    folder = tmp_path / "broken"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.jpg").write_text("words")
    assert run(folder, "--csv", tmp_path / "out.csv") == 1
    assert "none of the 3 pictures can be read" in capsys.readouterr().err
    assert len(rows(tmp_path / "out.csv")) == 3


def test_stopped_it_leaves_the_rows_so_far(run, photos, tmp_path, monkeypatch, capsys):
    encode, calls = clipn.CLIPN.encode_image, []

    def stopping(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(clipn.CLIPN, "encode_image", stopping)
    assert run(photos, "--csv", tmp_path / "out.csv", "--batch-size", 2) == 130
    assert len(rows(tmp_path / "out.csv")) == 4 and "stopped: 4 pictures" in capsys.readouterr().err


def test_other_ways_to_name_classes(run, photos, capsys):
    assert run(photos / "a.png", classes="horse,cow, sea lion") == 0
    out = capsys.readouterr().out
    assert any(name in out for name in ("horse", "cow", "sea lion"))
    listed = photos.parent / "names.json"
    listed.write_text(json.dumps(["horse", "cow"]))
    assert run(photos / "a.png", classes=listed) == 0
    assert run(photos / "a.png", classes="horse,") == 0
    assert "horse" in capsys.readouterr().out


def ood_of(rows):
    return {row.file for row in rows if row.is_ood == "True"}


def test_the_folder_to_move_to_is_made(run, photos, tmp_path, capsys):
    for aside in (tmp_path / "new" / "aside", photos / "aside"):
        assert run(photos, "--move-ood", aside, "--csv", tmp_path / "out.csv") == 0
        moved = ood_of(rows(tmp_path / "out.csv"))
        assert files(aside) == sorted(os.path.basename(name) for name in moved)
        assert not any(os.path.exists(name) for name in moved)
        if moved:
            break
    assert moved, "nothing was moved"


def test_links_are_not_moved(run, photos, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in list(photos.rglob("*.*")):
        if path.is_file() and not path.name.startswith("."):
            path.rename(elsewhere / path.name)
    (photos / "behind").symlink_to(elsewhere)
    (photos / "link.png").symlink_to(elsewhere / "a.png")
    assert run(photos, "--move-ood", tmp_path / "aside", "--csv", tmp_path / "out.csv") == 0
    found = [row for row in rows(tmp_path / "out.csv") if row.is_ood == "True"]
    assert found and all("a link" in row.error for row in found)
    assert not files(tmp_path / "aside") and f"{len(found)} not moved" in capsys.readouterr().err


def test_places_within_others_count_once(run, photos, tmp_path, capsys):
    assert run(photos / "sub", photos, photos / "a.png", photos, "--csv", tmp_path / "out.csv") == 0
    assert len(rows(tmp_path / "out.csv")) == 5


@pytest.mark.parametrize("target", ["photos/a.png", "names.txt", "photos"])
def test_the_csv_takes_the_place_of_nothing_else(run, photos, tmp_path, capsys, target):
    before = (tmp_path / target).read_bytes() if target != "photos" else None
    assert run(photos, "--csv", tmp_path / target) == 1
    assert target in capsys.readouterr().err
    assert before is None or (tmp_path / target).read_bytes() == before


def test_an_older_csv_of_its_own_is_replaced(run, photos, tmp_path, capsys):
    assert run(photos, "--csv", tmp_path / "out.csv") == run(photos / "sub", "--csv", tmp_path / "out.csv") == 0
    assert len(rows(tmp_path / "out.csv")) == 2


def test_a_folder_cannot_be_its_own_way_out(run, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("words")
    for target in (photos, tmp_path / "file"):
        assert run(photos, "--move-ood", target) == 1
        assert "move-ood" in capsys.readouterr().err


def test_a_name_of_two_lines_stays_in_one(run, photos, capsys):
    (photos / "a.png").rename(photos / "two\nlines\x1b[31m.png")
    assert run(photos) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 5 and "\x1b" not in out


def test_who_looks_at_the_first_line_only(run, photos, checkpoint, tmp_path):
    words = f"predict {photos} --classes a,b --checkpoint {checkpoint} --batch-size 1 | head -1"
    command = f'"{sys.executable}" -m clipn {words}'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 1 and "rror" not in done.stderr


def test_stopped_while_it_sets_up(run, photos, monkeypatch, capsys):
    def stopping(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(clipn.CLIPN, "encode_text", stopping)
    assert run(photos) == 130


def test_a_share_to_keep_needs_pictures_to_keep(run, photos, capsys):
    assert run(photos, "--keep", 0.9) == 1 and "--calibrate" in capsys.readouterr().err


def test_a_file_of_names_by_folder_and_one_that_is_a_pipe(run, photos, tmp_path, capsys):
    (tmp_path / "names.json").write_text(json.dumps({"n01": "horse, steed", "n02": "cow"}))
    assert run(photos / "a.png", classes=tmp_path / "names.json") == 0
    out = capsys.readouterr().out
    assert ("horse" in out or "cow" in out) and "steed" not in out
    reader, writer = os.pipe()
    os.write(writer, b"horse\ncow\n")
    os.close(writer)
    assert run(photos / "a.png", classes=f"/dev/fd/{reader}") == 0
