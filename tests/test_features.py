"""Stored features: the same training as without them, restarts, and refusals."""

import errno
import io
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import architecture, write_clipn
from helpers import files, run_ranks, write_images, write_shard
from PIL import Image
from test_train import assert_same, weights
from torch.utils.data import default_collate

import clipn.data.shards
import clipn.runtime.files
import clipn.runtime.signals
from clipn.config.loading import load_config
from clipn.data.images import pixel_input
from clipn.data.pairs import open_pairs, pair_dataset
from clipn.data.storage import read_range
from clipn.features.pairs import count_causes, pair_features
from clipn.features.store import FeatureStore
from clipn.model.base import get_tokenizer
from clipn.model.clipn import CLIPN, configured_model
from clipn.runtime.distributed import choose_device, process_group, rank
from clipn.training.loop import train

NEAR = {"rtol": 2e-4, "atol": 2e-5}
FROM_FEATURES = ["data.source=features", "features.dtype=float32"]


def samples(count: int, broken=()) -> dict[str, dict[str, bytes]]:
    """Samples for `write_shard`: noise, so that every crop differs, and captions of many lengths."""
    made = {}
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((40, 30)).save(stream, "PNG")
        image = stream.getvalue()[: 40 if n in broken else None]
        made[f"{n:05d}"] = {"png": image, "txt": " ".join(["cat", "dog", "owl"][: n % 3 + 1] + [str(n)]).encode()}
    return made


def make_settings(folder):
    """Write pairs, model and config of 2 epochs x 3 steps of 6 of 20 pairs; returns (key=value ...) -> config."""
    write_shard(folder / "pairs.tar", samples(20))
    (folder / "model.json").write_text(json.dumps(architecture()))
    write_clipn(folder / "clipn.pt")
    (folder / "config.yaml").write_text(
        f"""
run: {{dir: {folder}/run, device: cpu}}
model: {{name: {folder}/model.json, pretrained: {folder}/clipn.pt}}
data: {{shards: {folder}/pairs.tar, workers: 0, index_dir: {folder}/index, crop_scale: [0.3, 1.0], flip: 0.5}}
features: {{dir: {folder}/features, part_size: 4, batch_size: 3}}
train: {{epochs: 2, batch_size: 6, precision: fp32, log_every_steps: 1, lr: 1e-3, eps: 1e-2}}
"""
    )
    return lambda *overrides: load_config(folder / "config.yaml", overrides)


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with complete features, and other models and shards, for tests that change nothing; and its settings."""
    folder = tmp_path_factory.mktemp("filled")
    settings = make_settings(folder)
    features_of(settings())
    write_clipn(folder / "other.pt", base_seed=7)
    write_clipn(folder / "gelu.pt", quick_gelu=True)
    (folder / "gelu.json").write_text(json.dumps(architecture(quick_gelu=True)))
    write_shard(folder / "more.tar", samples(21))
    return folder, settings


def inputs_of(config):
    """The model, tokenizer and pairs that a config names."""
    pairs = open_pairs(config.data) if config.data.shards else None
    return configured_model(config.model, "cpu"), get_tokenizer(config.model.name), pairs


def features_of(config):
    return pair_features(config, *inputs_of(config))


def logged(config, *names) -> list[float]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines for name in names]


def part_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("part_*"))}


# Training


@pytest.mark.parametrize("num_prompts, templates", [(3, "['{}']"), (0, "['a photo of {}','{}','one {}']")])
def test_training_from_features_is_training_from_pairs(settings, tmp_path, num_prompts, templates):
    write_clipn(tmp_path / "clipn.pt", num_prompts)
    more = [f"model.num_prompts={num_prompts}", f"data.caption_templates={templates}", "run.seed=5", "features.seed=5"]
    online = settings(*more, f"run.dir={tmp_path}/online")
    stored = settings(*more, *FROM_FEATURES, "features.views=2")
    assert_same(weights(train(online)), weights(train(stored)), **NEAR)
    names = ("loss", "itbo_yes", "itbo_no", "tso", "grad_norm")
    assert logged(stored, *names) == pytest.approx(logged(online, *names), rel=1e-3)
    half = settings(*more, "data.source=features", f"run.dir={tmp_path}/half", f"features.dir={tmp_path}/half")
    train(half)  # with one view
    assert features_of(half).batch([(0, 0)])["image_features"].dtype == torch.float16
    assert logged(half, "loss")[:3] == pytest.approx(logged(online, "loss")[:3], rel=2e-3)
    assert logged(half, "loss")[3:] != pytest.approx(logged(online, "loss")[3:], rel=2e-3), "it repeats the crops"


@pytest.mark.parametrize("part_size", [3, 100])
@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}])
def test_every_row_is_found_in_its_part(settings, tmp_path, part_size, text):
    (tmp_path / "model.json").write_text(json.dumps(architecture(text=text)))
    write_clipn(tmp_path / "clipn.pt", 0, text=text)
    more = ["model.num_prompts=0", "features.views=2", "features.seed=3", *FROM_FEATURES]
    config = settings(*more, f"features.part_size={part_size}", "data.caption_templates=['a {}','{}, a nice one']")
    model, tokenizer, pairs = inputs_of(config)

    def padded(texts):  # a tower without causal mask reads the tokens behind the end token
        tokens = tokenizer(texts)
        return torch.where(tokens == 0, 7, tokens) if text else tokens

    features = pair_features(config, model, padded, pairs)
    assert len(features) == 20 and len(files(config.features.dir)) == 1 + -(-20 // part_size)
    dataset = pair_dataset(config, pairs, model.preprocess, padded, config.features.seed)
    rows = [19, 3, 0, 2, 4, 3, 11]
    batches = [features.batch([(epoch, row) for row in rows]) for epoch in (0, 1, 2)]
    to_input = pixel_input(model.preprocess, torch.device("cpu"))
    for epoch, batch in enumerate(batches):
        expected = default_collate([dataset[epoch % 2, row] for row in rows])
        assert all(torch.equal(batch[name], expected[name]) for name in ("tokens", "no_tokens"))
        with torch.no_grad():
            image, yes = model.encode_image(to_input(expected["image"])), model.encode_text(expected["tokens"])
        torch.testing.assert_close(batch["image_features"], image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["yes_features"], yes, rtol=1e-4, atol=1e-5)
    assert not torch.equal(batches[0]["image_features"], batches[1]["image_features"])
    assert not torch.equal(batches[0]["no_tokens"], batches[0]["tokens"])


def train_and_record(config_file, *overrides):
    """Train, and leave a file that says which rank wrote which part."""

    def record(self, part, columns, write=FeatureStore.write):
        (self.folder.parent / f"written_{part}_by_{rank()}").touch(exist_ok=False)
        write(self, part, columns)

    FeatureStore.write = record
    with process_group(choose_device("cpu")):
        train(load_config(config_file, overrides))


def test_two_ranks_fill_one_store_and_train_as_one_process(settings, tmp_path):
    single = settings(*FROM_FEATURES, f"run.dir={tmp_path}/single", f"features.dir={tmp_path}/single/features")
    train(single)
    run_ranks(2, train_and_record, tmp_path / "config.yaml", *FROM_FEATURES, "train.micro_batch_size=2")
    notes = [name for name in files(tmp_path / "features") if name.startswith("written")]
    assert notes == [f"written_{part}_by_{part % 2}" for part in range(5)]
    assert part_bytes(tmp_path / "features") == part_bytes(tmp_path / "single/features")
    assert_same(*(weights(f"{tmp_path}/{run}/checkpoints/last.pt") for run in ("single", "run")), **NEAR)
    assert logged(settings(), "loss") == pytest.approx(logged(single, "loss"), rel=1e-4)


def test_unreadable_pairs_are_left_out_and_counted(settings, tmp_path, caplog):
    broken = {2, 3, 9}  # a whole part, and one in another
    write_shard(tmp_path / "pairs.tar", samples(20, broken) | {"x": samples(1)["00000"] | {"txt": b" "}})
    config = settings(*FROM_FEATURES, "features.part_size=2", "data.max_bad_fraction=0.2")
    model, tokenizer, pairs = inputs_of(config)
    features = pair_features(config, model, tokenizer, pairs)
    assert len(features) == 17 and count_causes(features.skipped) == {"empty caption": 1, "broken image": 3}
    assert features.skipped[:, 0].tolist() == [2, 3, 9, 20] and caplog.text.count("skipped") == 4
    readable, batch = [n for n in range(20) if n not in broken], features.batch([(0, row) for row in range(17)])
    assert batch["number"].tolist() == readable
    assert torch.equal(batch["tokens"], tokenizer([pairs[n].caption for n in readable]))
    train(config)
    assert logged(config, "step") == [1, 2, 3, 4]
    write_shard(tmp_path / "pairs.tar", samples(6, range(6)))
    with pytest.raises(ValueError, match="none of its 6 pairs is readable"):
        features_of(settings(f"features.dir={tmp_path}/none"))


@pytest.mark.parametrize("block, requests", [(2**20, 4), (1, 20)])
def test_shards_are_read_front_to_back_by_few_requests(settings, tmp_path, monkeypatch, block, requests):
    made = list(samples(20).items())
    for name, part in (("a", made[:10]), ("b", made[10:])):
        write_shard(tmp_path / f"{name}.tar", {key: files | {"json": b"{}"} for key, files in part})
    config = settings(f"data.shards={tmp_path}/{{a,b}}.tar", "features.part_size=20", "features.batch_size=5")
    inputs, reads = inputs_of(config), []

    def recorded(path, start, size):
        reads.append((path.name, start, start + size))
        return read_range(path, start, size)

    monkeypatch.setattr(clipn.data.shards, "read_range", recorded)
    monkeypatch.setattr(clipn.data.shards, "BLOCK", block)
    features = pair_features(config, *inputs)
    assert len(reads) == requests, "one for a batch, or for a pair when a block holds no more"
    for (shard, _, end), (following, start, _) in pairwise(reads):
        assert shard <= following and (shard < following or end <= start)
    whole = features_of(settings(f"features.dir={tmp_path}/whole"))  # the same pairs in one shard
    batches = [stored.batch([(0, row) for row in range(20)]) for stored in (features, whole)]
    assert_same(*batches)


# Restarts and disks


def test_a_killed_run_encodes_only_the_parts_that_are_not_there(settings, tmp_path, monkeypatch, encoded):
    straight = settings(*FROM_FEATURES, f"run.dir={tmp_path}/straight", f"features.dir={tmp_path}/straight/features")
    train(straight)
    assert sum(encoded) == 20
    encoded.clear()
    config, counted = settings(*FROM_FEATURES), CLIPN.encode_image

    def killed(self, images):
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return counted(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CLIPN, "encode_image", killed)
        train(config)
    assert files(tmp_path / "features") == ["manifest.json", "part_00000.safetensors", "part_00001.safetensors"]
    encoded.clear()
    assert_same(weights(train(config)), weights(f"{tmp_path}/straight/checkpoints/last.pt"))
    assert sum(encoded) == 12 and part_bytes(tmp_path / "features") == part_bytes(tmp_path / "straight/features")
    encoded.clear()
    train(settings(*FROM_FEATURES, f"run.dir={tmp_path}/again", "run.seed=1"))
    assert encoded == []


def test_a_full_disk_leaves_no_broken_part(settings, tmp_path, monkeypatch):
    inputs = inputs_of(settings())
    full = Mock(side_effect=[None, None, OSError(errno.ENOSPC, "No space left on device")])  # the manifest, two parts
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(clipn.runtime.files.os, "fsync", full)
        pair_features(settings(), *inputs)
    assert files(tmp_path / "features") == ["manifest.json", "part_00000.safetensors"]
    assert len(features_of(settings())) == 20


def test_too_little_space_is_reported_before_any_work(settings, tmp_path, monkeypatch, encoded):
    one_pair = 32 * (1 + 1) * 2  # float16, an image and a text
    free = SimpleNamespace(free=20 * one_pair - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=rf"{tmp_path}/features/pairs: the features need"):
        features_of(settings())
    assert encoded == []
    free.free += 1
    assert len(features_of(settings())) == 20
    free.free = 4 * one_pair  # space for the missing part is enough
    os.remove(tmp_path / "features/pairs/part_00002.safetensors")
    assert len(features_of(settings())) == 20


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_damaged_part_is_named(filled, tmp_path, size):
    folder, settings = filled
    shutil.copytree(folder / "features", tmp_path / "features")
    file = tmp_path / "features/pairs/part_00003.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    config = settings(f"features.dir={tmp_path}/features")
    with pytest.raises(ValueError, match=r"part_00003\.safetensors: not a whole feature file.*delete it"):
        features_of(config)
    file.unlink()
    assert len(features_of(config)) == 20


def test_a_signal_that_a_fork_lost_stops_before_the_next_batch(settings, monkeypatch):
    monkeypatch.setattr(clipn.runtime.signals, "_asked", [15])
    with pytest.raises(KeyboardInterrupt):
        features_of(settings())


def test_pairs_of_an_outage_can_be_encoded_again(settings, tmp_path, caplog):
    folder = write_images(tmp_path / "images", *(f"{n}.png" for n in range(20)))
    rows = "".join(f"images/{n}.png,caption {n}\n" for n in range(20))
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + rows)
    config = settings(f"data.shards={tmp_path}/pairs.csv", "features.part_size=5", "data.max_bad_fraction=0.1")
    away = (folder / "7.png").rename(tmp_path / "7.png")
    assert len(features_of(config)) == 19
    part = tmp_path / "features/pairs/part_00001.safetensors"
    assert f"could not be read, delete from {part.parent}: {part.name}" in caplog.text
    away.rename(folder / "7.png")
    part.unlink()
    assert len(features_of(config)) == 20


def test_a_folder_keeps_its_part_size(filled):
    rows = [(0, row) for row in range(20)]
    first, again = (features_of(filled[1](f"features.part_size={size}")).batch(rows) for size in (4, 3))
    assert_same(first, again)


# A folder of other features


@pytest.mark.parametrize(
    "words, change",
    [
        ("model.pretrained={}/other.pt", r"weights: '\w+' there, '\w+' now"),
        ("model.name={}/gelu.json model.pretrained={}/gelu.pt", "model.quick_gelu: None there, True now"),
        ("features.views=2", "views: 1 there, 2 now"),
        ("features.seed=2", "seed: 0 there, 2 now"),
        ("train.precision=bf16", "precision: 'fp32' there, 'bf16' now"),
        ("data.crop_scale=[0.5,1.0]", r"crop_scale: \[0\.3, 1\.0\] there, \[0\.5, 1\.0\] now"),
        ("data.flip=1", r"flip: 0\.5 there, 1\.0 now"),
        ("model.num_prompts=0", "negated: False there, True now"),
        ("model.image_mean=[0,0,0]", r"preprocess\.mean: \[.*\] there, \[0\.0, 0\.0, 0\.0\] now"),
        ("data.caption_templates=['{{}}!']", r"caption_templates: \['{}'\] there, \['{}!'\] now"),
        ("data.caption_column=text", "caption_column: 'title' there, 'text' now"),
        ("data.shards={}/more.tar", r"pairs: '\w+' there, '\w+' now; samples: 20 there, 21 now"),
    ],
)
def test_features_of_something_else_are_refused(filled, words, change):
    folder, settings = filled
    before = part_bytes(folder / "features")
    with pytest.raises(ValueError, match=rf"features of something else: .*{change}.* Choose another features\.dir"):
        features_of(settings(*words.format(folder, folder).split()))
    assert part_bytes(folder / "features") == before


def test_features_of_rewritten_shards_are_refused(settings, tmp_path):
    features_of(settings())
    size, changed = (tmp_path / "pairs.tar").stat().st_size, samples(20)
    changed["00003"]["txt"] = b"another caption"
    assert write_shard(tmp_path / "pairs.tar", changed).stat().st_size == size, "tar files are padded"
    with pytest.raises(ValueError, match="features of something else: pairs: "):
        features_of(settings())


def test_features_can_be_used_without_their_pairs(settings, tmp_path):
    last = train(settings(*FROM_FEATURES))
    os.remove(tmp_path / "pairs.tar")
    shutil.copy(tmp_path / "model.json", tmp_path / "moved.json")
    alone = settings(*FROM_FEATURES, "data.shards=''", f"run.dir={tmp_path}/b", f"model.name={tmp_path}/moved.json")
    assert_same(weights(train(alone)), weights(last))
    os.remove(tmp_path / "features/pairs/part_00001.safetensors")
    with pytest.raises(ValueError, match=r"1 of 5 parts are missing, and data\.shards names no pairs"):
        features_of(alone)
    with pytest.raises(FileNotFoundError, match=r"features\.dir='.*/nowhere': no features there"):
        features_of(settings("data.shards=''", f"features.dir={tmp_path}/nowhere"))
    assert not (tmp_path / "nowhere").exists()
