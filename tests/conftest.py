"""What the tests share: small models, test servers and the golden model."""

import json
import logging
import lzma
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import numbered_samples, write_shard
from PIL import Image

from clipn.config.loading import load_config
from clipn.config.schema import Config, DataConfig
from clipn.model.base import build_base
from clipn.model.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from clipn.model.clipn import CLIPN
from clipn.training.loop import train

torch.set_num_threads(1)

GOLDEN = Path(__file__).resolve().parent / "golden"

VISION = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def architecture(vision: dict | None = None, text: dict | None = None, **more) -> dict:
    """A model config small enough for tests."""
    return {"embed_dim": 32, "vision_cfg": {**VISION, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}, **more}


@pytest.fixture(autouse=True)
def plain_log():
    """Take off what a command hangs on the package's log: a file, and a stream that pytest closes."""
    yield
    log = logging.getLogger("clipn")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True
    os.environ.pop("CLIPN_COMMAND", None)  # set by clipn.cli.main


def write_clipn(path: Path, num_prompts=3, base_seed=0, no_seed=1, **more) -> Path:
    """A checkpoint whose no tower is not its yes tower: where n = g, TSO's gradient is mostly rounding."""
    torch.manual_seed(base_seed)
    base, made = build_base(architecture(**more))
    model = CLIPN(base, num_prompts, made)
    torch.manual_seed(no_seed)
    with torch.no_grad():
        for parameter in model.no_text.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    write_checkpoint({"state_dict": model.published_state(), "architecture": made}, path)
    return path


@pytest.fixture
def encoded(monkeypatch):
    """The sizes of the image batches that were encoded."""
    sizes = []

    def count(name):
        encode = getattr(CLIPN, name)

        def counted(self, images):
            sizes.append(len(images))
            return encode(self, images)

        monkeypatch.setattr(CLIPN, name, counted)

    count("encode_image"), count("encode_image_with_tower")
    return sizes


@pytest.fixture
def settings(tmp_path):
    """Data settings that remember indexes in the test's own folder."""

    def _settings(shards, **more) -> DataConfig:
        shards = [str(s) for s in shards] if isinstance(shards, list) else str(shards)
        return DataConfig(shards=shards, index_dir=str(tmp_path / "index"), workers=more.pop("workers", 0), **more)

    return _settings


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, name, asked = self.server, self.path.strip("/").partition("?")[0], self.headers["Range"] or ""
        server.requests.append(f"{self.command} {name} {asked}")
        fault = next(server.faults.get(name, iter([])), None)
        if isinstance(fault, float):
            server.stalled.set()
            server.over.wait(fault)
        if name not in server.files or fault == "503":
            return self.send_error(503 if fault else 404)
        content = server.files[name]
        if span := server.ranges and re.fullmatch(r"bytes=(\d+)-(\d+)", asked):
            content = content[int(span[1]) : int(span[2]) + 1]
        self.send_response(206 if span else 200)
        for key, value in ({"Content-Length": str(len(content))} | server.headers).items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // (2 if fault == "cut" else 1)] if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serves `files`; the next requests for a file meet its `faults`: "503", "cut", or seconds to wait."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Iterator[str | float | None]] = {}
        self.headers = {"ETag": '"1"'}
        self.ranges = True
        self.requests: list[str] = []
        self.stalled, self.over = threading.Event(), threading.Event()

    def handle_error(self, *arguments) -> None:
        """Ignores clients that stop reading."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


@pytest.fixture
def server():
    with Server() as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.over.set()
        made.shutdown()


@pytest.fixture(scope="session")
def base_clip(tmp_path_factory) -> Path:
    """A folder with a tiny base CLIP: model.json and clip.pt. Tests only read it."""
    folder = tmp_path_factory.mktemp("base_clip")
    (folder / "model.json").write_text(json.dumps(architecture()))
    torch.manual_seed(0)
    base, made = build_base(architecture())
    write_checkpoint({"state_dict": base.state_dict(), "architecture": made}, folder / "clip.pt")
    return folder


def write_config(folder: Path, base_clip: Path) -> Path:
    """Write a config and its pairs: a run of 2 epochs x 3 steps of 6 pairs on the tiny base CLIP."""
    write_shard(folder / "pairs.tar", numbered_samples(20, first=40))
    path = folder / "config.yaml"
    path.write_text(
        f"""
run: {{dir: {folder}/run, device: cpu}}
model: {{name: {base_clip}/model.json, pretrained: {base_clip}/clip.pt, num_prompts: 3}}
data: {{shards: {folder}/pairs.tar, workers: 0, index_dir: {folder}/index}}
train: {{epochs: 2, batch_size: 6, precision: fp32, log_every_steps: 1, lr: 1e-3, checkpoint_every_steps: 2}}
"""
    )
    return path


def write_evaluation(folder: Path, sections: str, **more) -> Path:
    """Write a small model, model.json and clipn.pt, and a config of it with these sections. more: of `architecture`."""
    (folder / "model.json").write_text(json.dumps(architecture(**more)))
    write_clipn(folder / "clipn.pt", **more)
    path, model = folder / "config.yaml", f"name: {folder}/model.json, pretrained: {folder}/clipn.pt"
    path.write_text(f"run: {{dir: {folder}/run, device: cpu}}\nmodel: {{{model}}}\ndata: {{workers: 0}}\n{sections}")
    return path


@pytest.fixture
def config_file(tmp_path, base_clip) -> Path:
    return write_config(tmp_path, base_clip)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, base_clip) -> Path:
    """The folder of a finished run of `config_file`. Tests only read it, or copy it to their own run.dir."""
    config = load_config(write_config(tmp_path_factory.mktemp("finished"), base_clip))
    train(config)
    return Path(config.run.dir)


@pytest.fixture
def finished(config_file, finished_run) -> Config:
    """The config of a finished run, in a folder that the test may change."""
    config = load_config(config_file)
    shutil.copytree(finished_run, config.run.dir)
    return config


@pytest.fixture(scope="session")
def straight(finished_run, base_clip, tmp_path_factory) -> dict[str, dict]:
    """Each objective's weights at the end of an undisturbed run of `config_file`."""
    config_file = write_config(tmp_path_factory.mktemp("straight"), base_clip)
    ends = {"clipn": last_checkpoint(finished_run), "clip": train(load_config(config_file, ["train.objective=clip"]))}
    return {objective: read_checkpoint(path)["state_dict"] for objective, path in ends.items()}


def replace_figures(patch: pytest.MonkeyPatch) -> None:
    """Make an image of one pixel each figure of a report, because drawing takes seconds."""
    for name in ("draw_bars", "draw_histograms", "draw_roc", "draw_samples", "draw_places"):
        patch.setattr(f"clipn.report.write.{name}", lambda _: Image.new("RGB", (1, 1)))
    patch.setattr("clipn.report.write.save_figure", lambda image, path: image.save(path))


@pytest.fixture
def no_figures(monkeypatch):
    replace_figures(monkeypatch)


@pytest.fixture
def small_config(tmp_path) -> str:
    """The path of a small model's JSON config."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(architecture()))
    return str(path)


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> dict:
    """The paths, texts and expected values of the golden model; see golden/README.md."""
    checkpoint = tmp_path_factory.mktemp("golden") / "epoch_1.pt"
    checkpoint.write_bytes(lzma.decompress((GOLDEN / "epoch_1.pt.xz").read_bytes()))
    expected = json.loads((GOLDEN / "expected.json").read_text())
    with np.load(GOLDEN / "expected.npz") as arrays:
        expected["arrays"] = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return expected | {"config": str(GOLDEN / "model_config.json"), "checkpoint": str(checkpoint)}
