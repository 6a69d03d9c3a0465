"""Images of every kind as RGB images, and as the tensors of a model."""

import numpy as np
import pytest
import torch
from helpers import default_preprocess, image_bytes, write_images
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipn.data.image_sets import ImageFiles, open_image_set
from clipn.data.images import Augmentation, open_image, train_transform, val_transform


def test_every_kind_of_image_opens_as_rgb(tmp_path):
    rgb = Image.new("RGB", (9, 7), (200, 100, 50))
    modes = {"grey.png": "L", "palette.png": "P", "palette.gif": "P", "alpha.png": "RGBA", "grey_alpha.png": "LA"}
    modes |= {"print.jpg": "CMYK", "bits.png": "1", "plain.webp": "RGB", "plain.bmp": "RGB", "plain.tiff": "RGB"}
    for name, mode in modes.items():
        rgb.convert(mode).save(tmp_path / name)
        image = open_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (9, 7)), name
        assert open_image((tmp_path / name).read_bytes()) == image, name
        if not name.startswith(("grey", "bits")):
            assert np.allclose(np.asarray(image).mean(axis=(0, 1)), (200, 100, 50), atol=26), name


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (8, 6)), (6, (6, 0)), (8, (0, 8))])
def test_an_image_is_rotated_by_its_exif_orientation(tmp_path, orientation, corner):
    stored = Image.new("RGB", (9, 7))
    stored.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == ((9, 7) if orientation < 5 else (7, 9)) and image.getpixel(corner) == (255, 255, 255)


@pytest.mark.parametrize("kind, top", [(np.uint16, 65535), (np.float32, 1.0), (np.float32, 255.0)])
def test_an_image_of_16_bits_or_floats_keeps_its_greys(tmp_path, kind, top):
    ramp = np.linspace(0, top, 64).astype(kind).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.tiff")
    image = open_image(tmp_path / "deep.tiff")
    assert image.mode == "RGB" and np.allclose(np.asarray(image)[..., 0], ramp * (255.0 / top), atol=2)


def test_an_animated_image_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"no image", image_bytes()[:200]])
def test_an_unreadable_image_is_refused_or_left_out_with_a_warning(tmp_path, caplog, content):
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


HALF = default_preprocess(16) | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("make", [train_transform, val_transform])
@pytest.mark.parametrize("size", [(40, 20), (16, 16), (5, 9), (1, 1)])
def test_any_size_becomes_the_models(make, size):
    tensor = make(default_preprocess(16))(Image.new("RGB", size, (10, 20, 30)))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32


@pytest.mark.parametrize("preprocess", [HALF, default_preprocess(16)], ids=["half", "openai"])
@pytest.mark.parametrize("make, training", [(train_transform, True), (val_transform, False)])
def test_the_default_transforms_are_open_clips(make, training, preprocess):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    cfg = PreprocessCfg(**preprocess) if preprocess is HALF else PreprocessCfg(size=16)
    ours, theirs = make(preprocess), image_transform_v2(cfg, is_train=training)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)


def test_each_augmentation_changes_an_image():
    left, right = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16))
    left.paste((255, 255, 255), (0, 0, 8, 16))
    right.paste((255, 255, 255), (8, 0, 16, 16))
    whole = {"crop_scale": (1.0, 1.0)}
    mirrored = train_transform(HALF, Augmentation(**whole, flip=1.0))(left)
    assert torch.equal(mirrored, train_transform(HALF, Augmentation(**whole))(right))
    grey = Image.new("RGB", (16, 16), (60, 120, 180))
    erased = train_transform(HALF, Augmentation(**whole, erase=1.0))(grey)
    assert 0 < (erased == 0).all(dim=0).float().mean() < 0.3
    for strength in (0.0, 0.5):
        jittered = train_transform(HALF, Augmentation(**whole, color_jitter=strength))
        assert (len({tuple(jittered(grey)[:, 0, 0].tolist()) for _ in range(5)}) > 1) == (strength > 0)
