"""Held-out pairs: their figures, when they are measured, and the ablations that choose by them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import numbered_samples, write_shard
from sklearn.metrics import roc_auc_score

from clipn import ablation
from clipn.config.loading import base_config, load_config
from clipn.data.pairs import open_pairs
from clipn.features.pairs import pair_features
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import last_checkpoint
from clipn.model.weights import open_model
from clipn.training.loop import train
from clipn.training.validation import margin_figures


@pytest.fixture
def held_out(tmp_path):
    """The word that names nine held-out pairs."""
    write_shard(tmp_path / "held_out.tar", numbered_samples(9, first=80))
    return f"data.val_shards={tmp_path}/held_out.tar"


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def slow_figures(image, yes, no, scale, bias) -> dict[str, float]:
    """The figures pair by pair in float64."""
    own, others = [], []
    for j in range(len(yes)):
        for i in range(len(image)):
            d = scale * float(image[i].double() @ (no[j] - yes[j]).double()) + bias
            (own if i == j else others).append(d)
    own, others = np.array(own), np.array(others)
    return {
        "itbo": np.log1p(np.exp(own)).mean() + np.log1p(np.exp(-others)).mean(),
        "accuracy": ((own < 0).mean() + (others > 0).mean()) / 2,
        "auroc": roc_auc_score(np.r_[np.zeros(len(own)), np.ones(len(others))], np.r_[own, others]),
    }


@pytest.mark.parametrize("scale, bias", [(30.0, -0.4), (5.0, 0.0)])
def test_figures_are_those_of_every_margin(monkeypatch, scale, bias):
    monkeypatch.setattr("clipn.training.validation._TEXTS", 7)
    draws = torch.Generator().manual_seed(0)
    image, yes, no = (F.normalize(torch.randn(24, 6, generator=draws), dim=1) for _ in range(3))
    no[3], image[5] = yes[3], image[4]  # ties: margins of exactly b, and two equal images
    assert margin_figures(image, yes, no, scale, bias) == pytest.approx(slow_figures(image, yes, no, scale, bias), 1e-5)


@pytest.mark.parametrize("words", [[], ["model.num_prompts=0"], ["model.no_tower=adapter", "model.bias=true"]])
@pytest.mark.parametrize("source", ["pairs", "features"])
def test_each_epoch_ends_with_the_figures_of_the_model_on_held_out_pairs(config_file, held_out, words, source):
    config = load_config(config_file, [*words, held_out, f"data.source={source}", "features.dtype=float32"])
    train(config)
    logged = lines(config.run.dir)
    assert [line["step"] for line in logged if "val_itbo" in line] == [3, 6], "at the end of each epoch alone"

    model = open_model(str(last_checkpoint(config.run.dir))).eval()
    tokenizer = get_tokenizer(model.architecture)
    own = replace(config, data=replace(config.data, shards=config.data.val_shards))
    own.features = replace(config.features, dir=f"{config.run.dir}/again")
    pairs = open_pairs(own.data)
    batch = pair_features(own, model, tokenizer, pairs).batch([(0, n) for n in range(9)])
    tokens = batch.get("no_tokens", tokenizer([pairs[n].caption for n in range(9)]))
    with torch.no_grad():
        no, bias = model.encode_no_text(tokens), model.no_text.bias
        bias, scale = 0.0 if bias is None else float(bias), float(model.logit_scale.exp())
    expected = slow_figures(batch["image_features"], batch["yes_features"], no, scale, bias)
    assert {name: logged[-1][f"val_{name}"] for name in expected} == pytest.approx(expected, 1e-3, 1e-5)


def test_held_out_pairs_change_no_weight(config_file, held_out, tmp_path, caplog):
    train(load_config(config_file, [f"run.dir={tmp_path}/without"]))
    assert not any(name.startswith("val_") for line in lines(tmp_path / "without") for name in line)
    with caplog.at_level("INFO"):
        train(load_config(config_file, [f"run.dir={tmp_path}/with", held_out]))
    assert "; val_itbo " in caplog.text
    first, second = (open_model(str(last_checkpoint(tmp_path / name))) for name in ("without", "with"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_wrong_held_out_pairs_are_errors(config_file, tmp_path):
    write_shard(tmp_path / "one.tar", numbered_samples(1))
    with pytest.raises(ValueError, match="one.tar.*only 1 readable pair; 2 or more"):
        train(load_config(config_file, [f"data.val_shards={tmp_path}/one.tar"]))
    with pytest.raises(FileNotFoundError, match="none.tar"):
        train(load_config(config_file, [f"data.val_shards={tmp_path}/none.tar"]))
    for words, message in (["train.objective=clip"], "data.val_shards='a.tar': .*objective=clip"), ([], "pattern"):
        value = "a.tar" if words else "{a: 1}"
        with pytest.raises(ValueError, match=message):
            load_config(config_file, [f"data.val_shards={value}", *words])


def test_a_base_has_no_held_out_pairs(config_file, held_out):
    config = load_config(config_file, [held_out, "base={train: {objective: clip}, model: {pretrained: null}}"])
    assert base_config(config).data.val_shards == ""


def test_an_ablation_compares_on_held_out_pairs_alone(config_file, held_out, tmp_path, capsys):
    words = ["train.tso_weight=0,1", "run.seeds=[0,1]", held_out]
    ablation.run_ablation(str(config_file), words)
    table = pd.read_csv(tmp_path / "run/ablations.csv")
    assert table.groupby("setting").size().tolist() == [2, 2]
    for row in table.itertuples():
        last = lines(tmp_path / f"run/ablations/{row.setting}/seed_{row.seed}")[-1]
        assert row.val_itbo == pytest.approx(last["val_itbo"]) and row.val_auroc == pytest.approx(last["val_auroc"])
    assert "held-out 100 ITBO" in capsys.readouterr().out
    with pytest.raises(ValueError, match="eval.id names no image set, and data.val_shards no pairs"):
        ablation.run_ablation(str(config_file), words[:-1])
