"""Image folders as named sets."""

import pytest
from helpers import messages, write_images

from clipn.data.image_sets import check_readable, open_image_set, open_image_sets


def names(images) -> list[str]:
    return [path.relative_to(images.root).as_posix() for path in images.paths]


def test_class_folders_are_labels_in_order(tmp_path):
    write_images(tmp_path, "owl/x/y/1.png", "cat/2/a.jpg", "cat/1.webp", "night owl/ä.JPEG", "日本/1.bmp")
    images = open_image_set("mine", tmp_path)
    assert images.classes == ["cat", "night owl", "owl", "日本"]
    assert names(images) == ["cat/1.webp", "cat/2/a.jpg", "night owl/ä.JPEG", "owl/x/y/1.png", "日本/1.bmp"]
    assert images.labels == [0, 0, 1, 2, 3]
    assert (images.name, images.root, len(images)) == ("mine", tmp_path, 5)


def test_hidden_and_other_files_are_ignored(tmp_path):
    write_images(tmp_path, "cat/1.png", "cat/._1.png", "cat/.thumbnails/1.png", ".cache/1.png")
    for path in ("cat/notes.txt", "README.md"):
        (tmp_path / path).write_text("?")
    images = open_image_set("tidy", tmp_path)
    assert (names(images), images.classes) == (["cat/1.png"], ["cat"])


def test_linked_class_folders_are_followed_once(tmp_path):
    real = write_images(tmp_path / "real", "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(real, target_is_directory=True)
    (real / "loop").symlink_to(real, target_is_directory=True)
    assert names(open_image_set("linked", tmp_path / "set")) == ["cat/1.png"]


def test_some_classes_only(tmp_path):
    write_images(tmp_path, "a/1.png", "b/1.png", "c/1.png", "d/1.png")
    kept = open_image_set("some", tmp_path, classes=["d", "b"])
    assert (kept.classes, names(kept), kept.labels) == (["b", "d"], ["b/1.png", "d/1.png"], [0, 1])
    assert open_image_set("some", tmp_path, exclude=["a", "c"]).classes == ["b", "d"]
    assert open_image_set("some", tmp_path, classes=["a", "b"], exclude=["a"]).classes == ["b"]


def test_shots_are_drawn_from_each_class(tmp_path):
    write_images(tmp_path, *(f"a/{n}.png" for n in range(20)), "b/1.png", "b/2.png", *(f"c/{n}.png" for n in range(9)))
    images = open_image_set("few", tmp_path)
    drawn = images.draw(4, seed=0)
    assert (drawn.labels, drawn.classes) == ([0] * 4 + [1] * 2 + [2] * 4, ["a", "b", "c"])
    assert [path.parent.name for path in drawn.paths] == [*"aaaabbcccc"] and drawn.paths == sorted(set(drawn.paths))
    assert images.draw(4, seed=0).paths == drawn.paths != images.draw(4, seed=1).paths


def test_an_empty_class_folder_matters_only_if_kept(tmp_path):
    write_images(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"image set 'mine'.*b holds no image"):
        open_image_set("mine", tmp_path)
    assert open_image_set("mine", tmp_path, exclude=["b"]).classes == ["a"]


def test_folders_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("gone", "file"):
        with pytest.raises(FileNotFoundError, match=rf"image set 'mine'.*{name}.*<class>/<image>"):
            open_image_set("mine", tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'mine': no image in .*empty"):
        open_image_set("mine", tmp_path / "empty")


def test_an_unknown_class_is_reported_with_the_folders(tmp_path):
    write_images(tmp_path, "cat/1.png", "dog/1.png")
    for choice in ({"classes": ["cow"]}, {"exclude": ["cow"]}):
        with pytest.raises(ValueError, match=r"'mine'.*no class folder 'cow'.*cat, dog"):
            open_image_set("mine", tmp_path, **choice)
    with pytest.raises(ValueError, match=r"'mine'.*left.*cat, dog"):
        open_image_set("mine", tmp_path, exclude=["cat", "dog"])
    write_images(tmp_path, *(f"c{n:03d}/1.png" for n in range(30)))
    with pytest.raises(ValueError, match=r"32 in all") as error:
        open_image_set("many", tmp_path, classes=["x"])
    assert "c029" not in str(error.value)


def test_a_folder_with_images_in_it_has_no_labels(tmp_path):
    for paths in (["1.png", "2.jpg"], ["1.png", "2.jpg", "sub/3.png"]):
        images = open_image_set("mixed", write_images(tmp_path, *paths[::-1]))
        assert (names(images), images.labels, images.classes) == (paths, [], [])
    with pytest.raises(ValueError, match="beside its class folders"):
        open_image_set("mixed", tmp_path, classes=["sub"])


def test_unreadable_images_leave_a_set(tmp_path):
    images = open_image_set("mine", write_images(tmp_path, "a/1.png", "a/2.png", "b/1.png"))
    kept = images.without([1])
    assert (names(kept), kept.labels, kept.left_out) == (["a/1.png", "b/1.png"], [0, 1], [tmp_path / "a" / "2.png"])


def test_a_set_is_readable_if_one_image_is_and_no_further_one_is_read(tmp_path, caplog):
    write_images(tmp_path, "a/2.png")
    for name in ("1.png", "3.png"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    check_readable(open_image_set("mine", tmp_path))
    assert "1.png is no readable image" in messages(caplog) and "3.png" not in messages(caplog)
    (tmp_path / "a/2.png").unlink()
    with pytest.raises(ValueError, match=f"^image set 'mine': none of the 2 images in {tmp_path} is readable$"):
        check_readable(open_image_set("mine", tmp_path))


def test_every_form_of_a_set(tmp_path):
    a, b = write_images(tmp_path / "a", "x/1.png", "y/1.png"), write_images(tmp_path / "b", "1.png")
    assert [(s.name, len(s)) for s in open_image_sets(str(a), "eval.id")] == [("a", 2)]
    assert [(s.name, len(s)) for s in open_image_sets([str(b), str(a)], "eval.ood")] == [("b", 1), ("a", 2)]
    named = {"far": str(b), "near": {"path": str(a), "classes": ["x"]}, "rest": {"path": str(a), "exclude": ["x"]}}
    sets = open_image_sets(named, "eval.ood")
    assert [(s.name, s.root, s.classes) for s in sets] == [("far", b, []), ("near", a, ["x"]), ("rest", a, ["y"])]
    empty = {"all": {"path": str(a), "classes": None, "exclude": None}}
    assert open_image_sets(empty, "eval.ood")[0].classes == ["x", "y"]


def test_folders_without_a_name_have_different_names(tmp_path):
    folders = [f"{write_images(tmp_path / name / 'test', '1.png')}/" for name in ("svhn", "dtd")]
    assert [(s.name, s.root) for s in open_image_sets(folders[0], "eval.ood")] == [("test", tmp_path / "svhn" / "test")]
    assert [s.name for s in open_image_sets(folders, "eval.ood")] == ["svhn/test", "dtd/test"]
    with pytest.raises(ValueError, match=r"eval\.ood: the same folder is listed twice"):
        open_image_sets(folders[:1] * 2, "eval.ood")


@pytest.mark.parametrize("value", [None, [], {}, "", 3, [3], {"a": 3}, {"a": None}, {"a": []}, {"a": {"classes": []}}])
def test_a_wrong_form_is_refused(value):
    with pytest.raises((ValueError, FileNotFoundError), match=r"eval\.ood"):
        open_image_sets(value, "eval.ood")


def test_the_keys_of_an_entry(tmp_path):
    write_images(tmp_path, "cat/1.png", "c/1.png", "a/1.png", "t/1.png")
    with pytest.raises(ValueError, match=r"eval\.ood\.far.*clases.*classes or exclude"):
        open_image_sets({"far": {"path": str(tmp_path), "clases": ["a"]}}, "eval.ood")
    (images,) = open_image_sets({"far": {"path": str(tmp_path), "classes": "cat"}}, "eval.ood")
    assert images.classes == ["cat"], "one name is not four letters"
