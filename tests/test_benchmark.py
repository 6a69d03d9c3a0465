"""scripts/benchmark.py: timed modes and the report."""

import json

import pytest
import torch

from scripts import benchmark, benchmark_loader

MODES = ["plain", "online", "features", "adapter", "extract", "evaluate", "rescore", "probe", "sklearn"]


def test_every_mode_is_timed_and_written(small_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "RESCORED_IMAGES", 500)
    small = {"PROBE_IMAGES": 300, "PROBE_WIDTH": 8, "PROBE_CLASSES": 3, "PROBE_EPOCHS": 2}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    arguments = ["--model", small_config, "--batch-size", "4", "6", "--rounds", "2", "--device", "cpu"]
    benchmark.main([*arguments, "--mode", *MODES, "--json", str(tmp_path / "times.json")])
    results = json.loads((tmp_path / "times.json").read_text())["results"]
    assert [(row["mode"], row["batch_size"]) for row in results[:-3]] == [(m, b) for b in (4, 6) for m in MODES[:6]]
    for row in results[:-3]:
        assert row["pairs_per_s"] == pytest.approx(1000 * row["batch_size"] / row["ms_per_step"])
        assert row["model_flops_per_step"] > 0 and row["peak_memory_bytes"] > 0
    assert [row["mode"] for row in results[-3:]] == MODES[6:]
    assert all(row["seconds"] > 0 for row in results[-3:])
    assert results[-1]["objective"] < results[-2]["objective"], "scikit-learn finds the optimum"
    assert "times.json" in capsys.readouterr().out
    flops = {row["mode"]: row["model_flops_per_step"] for row in results[:4]}
    assert results[3]["speed_up_over_features"] > 0 and flops["adapter"] < flops["features"]
    assert flops["features"] < flops["online"] < flops["plain"]


def test_captions_have_the_requested_length():
    tokens = benchmark.random_captions(1000, 77, None)
    ends = tokens.argmax(dim=1)
    assert (tokens[:, 0] == 49406).all() and (tokens.gather(1, ends[:, None]) == 49407).all()
    assert 11 < float((ends + 1).float().mean()) < 13
    assert (benchmark.random_captions(5, 77, 20).argmax(dim=1) == 19).all()
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("installed", [True, False])
def test_the_loader_is_timed_beside_webdataset(tmp_path, capsys, monkeypatch, installed):
    small = {"PHOTOS": 2, "SHARDS": 2, "PAIRS_PER_SHARD": 20, "BATCH": 4, "WARM_UP": 1, "BATCHES": 2}
    for name, value in small.items():
        monkeypatch.setattr(benchmark_loader, name, value)
    if installed:
        pytest.importorskip("webdataset")
    else:
        monkeypatch.setattr(benchmark_loader, "webdataset", None)
    arguments = ["--mode", "loader", "--rounds", "2", "--workers", "1", "--device", "cpu"]
    benchmark.main([*arguments, "--json", str(tmp_path / "times.json")])
    ours, *others = json.loads((tmp_path / "times.json").read_text())["results"]
    assert ours["mode"] == "loader" and ours["pairs_per_s"] > 0 and 50e3 < ours["bytes_per_photo"] < 100e3
    assert [row["mode"] for row in others] == ["webdataset"] * installed
    printed = capsys.readouterr().out
    assert (
        f"{ours['speed_up_over_webdataset']:.2f} x webdataset" if installed else "pip install webdataset"
    ) in printed
