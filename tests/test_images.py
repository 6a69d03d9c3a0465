"""Images of every kind as RGB images, and as the tensors of a model."""

import io
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import default_preprocess, image_bytes, png_header, write_images
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2.functional import pil_to_tensor

import clipn.data.images
from clipn.data.image_sets import ImageFiles, open_image_set
from clipn.data.images import (
    Augmentation,
    decode_pixels,
    open_image,
    pixel_input,
    pixel_transform,
    train_transform,
    val_transform,
)


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


def photo(width=61, height=43) -> Image.Image:
    """A smooth picture with every brightness."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture
def jpeg_decoder(monkeypatch) -> Mock:
    """torchvision's decoder, which counts its calls."""
    decoder = Mock(wraps=clipn.data.images.decode_jpeg)
    monkeypatch.setattr(clipn.data.images, "decode_jpeg", decoder)
    return decoder


@pytest.mark.parametrize(
    "content, by_torchvision",
    [
        (encoded(photo()), True),
        (encoded(photo(), subsampling=0, progressive=True), True),
        (encoded(photo().convert("L")), True),
        (encoded(photo(), exif=turned(1)), True),
        (encoded(photo(), exif=turned(6)), False),
        (encoded(photo().convert("CMYK")), False),
        (encoded(photo(), "MPO", save_all=True, append_images=[photo()]), False),
        (encoded(photo(), "PNG"), False),
        (encoded(photo().convert("P"), "PNG"), False),
        (encoded(photo(), "WEBP"), False),
        (encoded(photo(), "GIF"), False),
    ],
    ids=["jpeg", "progressive", "grey", "upright", "rotated", "cmyk", "mpo", "png", "palette", "webp", "gif"],
)
def test_pixels_are_those_of_the_image_whoever_decodes_them(content, by_torchvision, jpeg_decoder):
    pixels, expected = decode_pixels(content), pil_to_tensor(open_image(content))
    assert pixels.dtype == torch.uint8 and pixels.shape == expected.shape
    difference = (pixels.int() - expected.int()).abs()
    assert difference.max() <= (8 if by_torchvision else 0), "other versions of libjpeg may round differently"
    assert jpeg_decoder.called == by_torchvision


def test_pil_has_the_last_word_on_a_jpeg_that_torchvision_refuses(monkeypatch):
    monkeypatch.setattr(clipn.data.images, "decode_jpeg", Mock(side_effect=RuntimeError("no")))
    for mode in ("RGB", "L"):
        content = encoded(photo().convert(mode))
        assert torch.equal(decode_pixels(content), pil_to_tensor(open_image(content)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(photo())[:30],
        encoded(photo())[:700],
        encoded(photo())[:-9],
        encoded(photo(), "PNG")[:200],
        png_header(50_000, 50_000),
        encoded(photo(1001, 1)),
    ],
    ids=["empty", "text", "header", "jpeg", "jpeg_end", "png", "huge", "thin"],
)
def test_a_file_without_pixels_raises_what_the_image_raises(content):
    errors = []
    for decode in (open_image, decode_pixels):
        with pytest.raises((OSError, ValueError, Image.DecompressionBombError)) as caught:
            decode(content)
        errors.append((caught.type, str(caught.value).split(" object at")[0]))
    assert errors[0] == errors[1]


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


@pytest.mark.parametrize("kind", ["image", "pixels"])
def test_training_pixels_have_the_draws_and_values_of_torchvisions_transforms_of_images(kind):
    """The public library's slower transforms of PIL images, with every augmentation."""
    steps = [
        transforms.RandomResizedCrop(16, scale=(0.3, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(0.5),
        transforms.ColorJitter(0.4, 0.4, 0.4),
        transforms.ToTensor(),
        transforms.Normalize(HALF["mean"], HALF["std"]),
        transforms.RandomErasing(0.5, scale=(0.02, 0.25)),
    ]
    ours, theirs = pixel_transform(HALF, Augmentation((0.3, 1.0), 0.5, 0.4, 0.5)), transforms.Compose(steps)
    image = photo()
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        pixels = ours(image if kind == "image" else pil_to_tensor(image))
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 16, 16)
        levels = 127.5 * (pixel_input(HALF, torch.device("cpu"))(pixels) - expected).abs()
        assert levels.max() < (0.51 if kind == "image" else 4) and levels.mean() < 1


def test_a_models_input_is_the_same_from_an_image_and_from_pixels():
    preprocess, image = default_preprocess(16), photo()
    expected = transforms.Normalize(preprocess["mean"], preprocess["std"])(transforms.ToTensor()(image))
    pixels = torch.stack([pil_to_tensor(image)] * 2)
    assert torch.equal(pixel_input(preprocess, torch.device("cpu"))(pixels), torch.stack([expected] * 2))
    assert pixels.dtype == torch.uint8, "the pixels themselves stay"


def test_each_augmentation_changes_pixels():
    left = torch.zeros(3, 16, 16, dtype=torch.uint8)
    left[..., :8] = 255
    whole = {"crop_scale": (1.0, 1.0)}
    mirrored = pixel_transform(HALF, Augmentation(**whole, flip=1.0))(left)
    assert torch.equal(mirrored, pixel_transform(HALF, Augmentation(**whole))(left.flip(-1)))
    grey = torch.tensor([60, 120, 180], dtype=torch.uint8)[:, None, None].expand(3, 16, 16)
    erased = pixel_transform(HALF, Augmentation(**whole, erase=1.0))(grey)
    assert 0 < (erased == 128).all(dim=0).float().mean() < 0.3, "the mean colour is 0 for a model"
    for strength in (0.0, 0.5):
        jittered = pixel_transform(HALF, Augmentation(**whole, color_jitter=strength))
        assert (len({tuple(jittered(grey)[:, 0, 0].tolist()) for _ in range(5)}) > 1) == (strength > 0)
