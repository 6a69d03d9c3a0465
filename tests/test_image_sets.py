"""Image folders as named sets, and images of every kind as tensors."""

import numpy as np
import pytest
import torch
from helpers import image_bytes, write_images
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipn.image_sets import ImageFiles, open_image_set, open_image_sets
from clipn.images import Augmentation, default_preprocess, open_image, train_transform, val_transform


def names(images) -> list[str]:
    return [path.relative_to(images.root).as_posix() for path in images.paths]


# Folders


def test_class_folders_are_labels_in_order(tmp_path):
    write_images(tmp_path, "owl/1.png", "cat/2.jpg", "cat/1.webp", "night owl/ä.JPEG", "日本/1.bmp")
    images = open_image_set("mine", tmp_path)
    assert images.classes == ["cat", "night owl", "owl", "日本"]
    assert names(images) == ["cat/1.webp", "cat/2.jpg", "night owl/ä.JPEG", "owl/1.png", "日本/1.bmp"]
    assert images.labels == [0, 0, 1, 2, 3]
    assert (images.name, images.root, len(images)) == ("mine", tmp_path, 5)


def test_a_flat_folder_has_no_labels(tmp_path):
    images = open_image_set("flat", write_images(tmp_path / "with a space", "b.png", "a.jpg"))
    assert (names(images), images.labels, images.classes) == (["a.jpg", "b.png"], [], [])


def test_images_deeper_in_a_class_folder_belong_to_it(tmp_path):
    images = open_image_set("deep", write_images(tmp_path, "cat/2/a.png", "cat/1.png", "dog/x/y/b.png"))
    assert names(images) == ["cat/1.png", "cat/2/a.png", "dog/x/y/b.png"]
    assert images.labels == [0, 0, 1]


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_images(tmp_path, "cat/1.png", "cat/._1.png", ".cache/1.png")
    (tmp_path / "cat" / "notes.txt").write_text("?")
    (tmp_path / "README.md").write_text("?")
    images = open_image_set("tidy", tmp_path)
    assert (names(images), images.classes) == (["cat/1.png"], ["cat"])


def test_a_hidden_folder_inside_a_class_is_passed_over(tmp_path):
    images = open_image_set("tidy", write_images(tmp_path, "cat/1.png", "cat/.thumbnails/1.png"))
    assert names(images) == ["cat/1.png"]


def test_linked_class_folders_are_followed(tmp_path):
    real = write_images(tmp_path / "real", "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(real, target_is_directory=True)
    assert names(open_image_set("linked", tmp_path / "set")) == ["cat/1.png"]


def test_some_classes_only(tmp_path):
    write_images(tmp_path, "a/1.png", "b/1.png", "c/1.png", "d/1.png")
    kept = open_image_set("some", tmp_path, classes=["d", "b"])
    assert (kept.classes, names(kept), kept.labels) == (["b", "d"], ["b/1.png", "d/1.png"], [0, 1])
    assert open_image_set("some", tmp_path, exclude=["a", "c"]).classes == ["b", "d"]
    assert open_image_set("some", tmp_path, classes=["a", "b"], exclude=["a"]).classes == ["b"]


def test_an_empty_class_folder_matters_only_if_kept(tmp_path):
    write_images(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"image set 'mine'.*b holds no image"):
        open_image_set("mine", tmp_path)
    assert open_image_set("mine", tmp_path, exclude=["b"]).classes == ["a"]


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image set 'mine'.*gone.*<class>/<image>"):
        open_image_set("mine", tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file"):
        open_image_set("mine", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"'mine': no image in .*empty"):
        open_image_set("mine", tmp_path / "empty")


def test_an_unknown_class_is_told_with_those_there_are(tmp_path):
    write_images(tmp_path, "cat/1.png", "dog/1.png")
    for more in ({"classes": ["cow"]}, {"exclude": ["cow"]}):
        with pytest.raises(ValueError, match=r"'mine'.*no class folder 'cow'.*cat, dog"):
            open_image_set("mine", tmp_path, **more)
    with pytest.raises(ValueError, match=r"'mine'.*left.*cat, dog"):
        open_image_set("mine", tmp_path, exclude=["cat", "dog"])


def test_a_long_list_of_classes_is_shortened(tmp_path):
    write_images(tmp_path, *(f"c{n:03d}/1.png" for n in range(30)))
    with pytest.raises(ValueError, match=r"30 in all") as error:
        open_image_set("many", tmp_path, classes=["x"])
    assert "c029" not in str(error.value)


# What a config can say


def test_every_form_of_a_set(tmp_path):
    a, b = write_images(tmp_path / "a", "x/1.png", "y/1.png"), write_images(tmp_path / "b", "1.png")
    assert [(s.name, len(s)) for s in open_image_sets(str(a), "eval.id")] == [("a", 2)]
    assert [(s.name, len(s)) for s in open_image_sets([str(b), str(a)], "eval.ood")] == [("b", 1), ("a", 2)]
    named = {"far": str(b), "near": {"path": str(a), "classes": ["x"]}, "rest": {"path": str(a), "exclude": ["x"]}}
    sets = open_image_sets(named, "eval.ood")
    assert [(s.name, s.root, s.classes) for s in sets] == [("far", b, []), ("near", a, ["x"]), ("rest", a, ["y"])]
    empty = {"all": {"path": str(a), "classes": None, "exclude": None}}
    assert open_image_sets(empty, "eval.ood")[0].classes == ["x", "y"]


def test_a_folder_with_a_slash_at_its_end_has_a_name(tmp_path):
    write_images(tmp_path / "cats", "1.png")
    assert open_image_sets(f"{tmp_path}/cats/", "eval.id")[0].name == "cats"


def test_folders_of_the_same_name_are_not_lost(tmp_path):
    """[svhn/test, dtd/test]: two sets or an error, never one of them in silence."""
    folders = [str(write_images(tmp_path / name / "test", "1.png")) for name in ("svhn", "dtd")]
    try:
        sets = open_image_sets(folders, "eval.ood")
    except ValueError as error:
        assert "test" in str(error)
    else:
        assert [str(s.root) for s in sets] == folders
        assert len({s.name for s in sets}) == 2


@pytest.mark.parametrize("value", [None, [], {}, "", 3, [3], {"a": 3}, {"a": None}, {"a": []}, {"a": {"classes": []}}])
def test_a_wrong_form_is_refused(value):
    with pytest.raises((ValueError, FileNotFoundError), match=r"eval\.ood"):
        open_image_sets(value, "eval.ood")


def test_a_wrong_key_of_an_entry_is_refused(tmp_path):
    write_images(tmp_path, "a/1.png")
    with pytest.raises(ValueError, match=r"eval\.ood\.far.*clases.*classes or exclude"):
        open_image_sets({"far": {"path": str(tmp_path), "clases": ["a"]}}, "eval.ood")


def test_one_class_may_be_a_word(tmp_path):
    """classes: cat -- one class, or an error that names the key; not a search for "c", "a" and "t"."""
    write_images(tmp_path, "cat/1.png", "c/1.png", "a/1.png", "t/1.png")
    try:
        (images,) = open_image_sets({"far": {"path": str(tmp_path), "classes": "cat"}}, "eval.ood")
    except ValueError as error:
        assert "classes" in str(error)
    else:
        assert images.classes == ["cat"]


# Images


def test_every_kind_of_image_opens_as_rgb(tmp_path):
    rgb = Image.new("RGB", (9, 7), (200, 100, 50))
    pictures = {
        "grey.png": rgb.convert("L"),
        "palette.png": rgb.convert("P"),
        "palette.gif": rgb.convert("P"),
        "alpha.png": rgb.convert("RGBA"),
        "grey_alpha.png": rgb.convert("LA"),
        "print.jpg": rgb.convert("CMYK"),
        "bits.png": rgb.convert("1"),
        "plain.webp": rgb,
        "plain.bmp": rgb,
        "plain.tiff": rgb,
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    for name in pictures:
        image = open_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (9, 7)), name
        if not name.startswith(("grey", "bits")):
            assert np.allclose(np.asarray(image).mean(axis=(0, 1)), (200, 100, 50), atol=26), name


def test_a_16_bit_image_keeps_its_greys(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.allclose(np.asarray(image)[..., 0], ramp / 257.0, atol=2), "not all white"


def test_an_animated_image_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_bytes_are_images_too():
    assert open_image(image_bytes((1, 2, 3), (5, 4), "PNG")).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("content", [b"", b"no image", image_bytes()[:200]])
def test_what_is_no_image_is_refused_or_left_out_with_a_warning(tmp_path, caplog, content):
    with pytest.raises((OSError, ValueError)):
        open_image(content)
    (tmp_path / "bad.jpg").write_bytes(content)
    assert ImageFiles([tmp_path / "bad.jpg"], val_transform(default_preprocess(8)))[0] == 0
    assert "bad.jpg is no readable image" in caplog.text


def test_image_files_are_decoded_in_order(tmp_path):
    write_images(tmp_path, "1.png", "2.png")
    images = open_image_set("two", tmp_path)
    files = ImageFiles(images.paths, val_transform(default_preprocess(8)))
    assert len(files) == 2 and files[1]["image"].shape == (3, 8, 8)
    for file, path in zip(files, images.paths, strict=True):
        assert torch.equal(file["image"], files.transform(open_image(path)))
    assert not torch.equal(files[0]["image"], files[1]["image"])


# Transforms

HALF = default_preprocess(16) | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("make", [train_transform, val_transform])
@pytest.mark.parametrize("size", [(40, 20), (16, 16), (5, 9), (1, 1)])
def test_any_size_becomes_the_models(make, size):
    tensor = make(default_preprocess(16))(Image.new("RGB", size, (10, 20, 30)))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32


@pytest.mark.parametrize("make", [train_transform, val_transform])
def test_images_are_normalised_with_the_given_statistics(make):
    image = Image.new("RGB", (20, 20), (255, 0, 51))
    assert torch.allclose(make(HALF)(image)[:, 8, 8], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)
    openai = make(default_preprocess(16))(image)[:, 8, 8]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = [(value - m) / s for value, m, s in zip((1, 0, 0.2), mean, std, strict=True)]
    assert torch.allclose(openai, torch.tensor(expected), atol=1e-5)


def picture(size=(40, 30)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def test_inference_is_open_clips():
    expected = image_transform_v2(PreprocessCfg(size=16), is_train=False)(picture())
    assert torch.equal(val_transform(default_preprocess(16))(picture()), expected)


def test_the_default_crop_is_open_clips():
    ours, theirs = train_transform(HALF), image_transform_v2(PreprocessCfg(**HALF), is_train=True)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = theirs(picture())
        torch.manual_seed(seed)
        assert torch.equal(ours(picture()), expected)


def test_augmentations_do_what_they_say():
    left, right = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16))
    left.paste((255, 255, 255), (0, 0, 8, 16))
    right.paste((255, 255, 255), (8, 0, 16, 16))
    whole = {"crop_scale": (1.0, 1.0)}
    mirrored = train_transform(HALF, Augmentation(**whole, flip=1.0))(left)
    assert torch.equal(mirrored, train_transform(HALF, Augmentation(**whole))(right))
    grey = Image.new("RGB", (16, 16), (60, 120, 180))
    erased = train_transform(HALF, Augmentation(**whole, erase=1.0))(grey)
    assert 0 < (erased == 0).all(dim=0).float().mean() < 0.3
    jittered = train_transform(HALF, Augmentation(**whole, color_jitter=0.5))
    assert len({tuple(jittered(grey)[:, 0, 0].tolist()) for _ in range(5)}) > 1
    plain = train_transform(HALF, Augmentation(**whole))
    assert len({tuple(plain(grey)[:, 0, 0].tolist()) for _ in range(5)}) == 1


def test_images_beside_folders_are_all_taken_without_labels(tmp_path):
    write_images(tmp_path, "1.png", "2.png", "sub/3.png")
    images = open_image_set("mixed", tmp_path)
    assert len(images) == 3 and images.labels == [] and images.classes == []
    with pytest.raises(ValueError, match="beside its class folders"):
        open_image_set("mixed", tmp_path, classes=["sub"])
