"""Training: what learns, resuming, interruption, many ranks, and the errors a user would meet."""

import json
import os
import signal
from pathlib import Path

import open_clip.transformer
import pytest
import torch
from conftest import architecture, write_clipn
from helpers import files, numbered_samples, write_shard

import clipn.model.packed_text
import clipn.training.objectives
from clipn.config.loading import load_config
from clipn.model.base import build_base
from clipn.model.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from clipn.runtime.signals import Interrupted
from clipn.training.loop import train
from clipn.training.optimizer import build_optimizer, learning_rate

ROOT = Path(__file__).resolve().parent.parent


def weights(path):
    return read_checkpoint(path)["state_dict"]


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if tolerance:
            torch.testing.assert_close(value, second[name], **tolerance)
        else:
            assert torch.equal(value, second[name]), name


def test_a_run_leaves_its_folder(config_file):
    config = load_config(config_file)
    last = train(config)
    content = read_checkpoint(last)
    assert content["epoch"] == 2 and content["config"]["train"]["epochs"] == 2
    before = weights(config.model.pretrained)
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in before.items() if "." in name)
    assert content["state_dict"]["prompt_no"].any()
    folder = Path(config.run.dir)
    assert load_config(folder / "config.yaml") == config
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * (line["itbo_yes"] + line["itbo_no"] + line["tso"]), rel=1e-4)
    assert files(folder / "checkpoints") == ["epoch_1.pt", "epoch_2.pt", "last.pt", "step_4.pt", "step_6.pt"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(config_file, tmp_path):
    runs = [f"run.dir={tmp_path}/{name}" for name in "abc"]
    first, second = (train(load_config(config_file, [run])) for run in runs[:2])
    other = train(load_config(config_file, [runs[2], "run.seed=1"]))
    assert_same(weights(first), weights(second))
    assert not torch.equal(weights(first)["prompt_no"], weights(other)["prompt_no"])


@pytest.mark.parametrize("objective", ["clipn", "clip"])
@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_stopped_run_resumes_to_the_same_bits(config_file, tmp_path, monkeypatch, objective, stop_at):
    more = [f"train.objective={objective}", "model.num_prompts=2"]
    straight = train(load_config(config_file, [*more, f"run.dir={tmp_path}/straight"]))
    config = load_config(config_file, more)
    kind = clipn.training.objectives.OBJECTIVES[objective]
    after_step, taken = kind.after_step, []

    def stop_after(self):
        taken.append(1)
        if len(taken) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self)

    monkeypatch.setattr(kind, "after_step", stop_after)
    with pytest.raises(Interrupted, match="the same command goes on"):
        train(config)
    assert len(taken) <= stop_at + 1
    assert_same(weights(train(config)), weights(straight))
    assert len(taken) == 6
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_loses_only_the_steps_after_its_checkpoint(config_file, tmp_path, monkeypatch):
    straight = train(load_config(config_file, [f"run.dir={tmp_path}/straight"]))
    config = load_config(config_file)
    prepare, taken = clipn.training.objectives.ClipnObjective.prepare, []

    def killed(self, batch, step):
        taken.append(step)
        if len(taken) == 6:
            raise MemoryError
        return prepare(self, batch, step)

    monkeypatch.setattr(clipn.training.objectives.ClipnObjective, "prepare", killed)
    with pytest.raises(MemoryError):
        train(config)
    assert_same(weights(train(config)), weights(straight))
    assert taken == [0, 1, 2, 3, 4, 5, 4, 5]  # checkpoints after steps 2, 3 (the epoch) and 4


def test_a_finished_run_trains_no_more(config_file, monkeypatch):
    config = load_config(config_file)
    train(config)
    monkeypatch.setattr(clipn.training.objectives.ClipnObjective, "prepare", None)
    assert train(config) == last_checkpoint(config.run.dir)


def test_another_run_in_the_folder_is_not_mixed_or_overwritten(config_file):
    train(load_config(config_file))
    with pytest.raises(ValueError, match=r"train\.lr: 0\.001 -> 0\.002"):
        train(load_config(config_file, ["train.lr=2e-3"]))
    with pytest.raises(ValueError, match="train.resume=never"):
        train(load_config(config_file, ["train.resume=never"]))
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        train(load_config(config_file, ["train.resume=missing.pt", f"run.dir={config_file.parent}/new"]))
    with pytest.raises(ValueError, match="no state of a training run"):
        train(
            load_config(
                config_file, [f"train.resume={config_file.parent}/clip.pt", f"run.dir={config_file.parent}/new"]
            )
        )


def test_a_loss_that_is_not_finite_stops_the_run(config_file, monkeypatch):
    loss, taken = clipn.training.objectives.ClipnObjective.loss, []

    def broken(self, trained, batch, rows):
        taken.append(rows)
        total, terms = loss(self, trained, batch, rows)
        return total * (float("nan") if len(taken) == 4 else 1), terms

    monkeypatch.setattr(clipn.training.objectives.ClipnObjective, "loss", broken)
    config = load_config(config_file)
    with pytest.raises(FloatingPointError, match=r"nan at step 4 of 6; the last good checkpoint is .*last\.pt"):
        train(config)
    assert len(taken) == 4
    content = read_checkpoint(last_checkpoint(config.run.dir))
    assert content["training"]["step"] == 3
    assert all(value.isfinite().all() for value in content["state_dict"].values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("objective", ["clipn", "clip"])
def test_mixed_precision_is_near_full_precision(config_file, tmp_path, precision, objective):
    more = [f"train.objective={objective}", "train.epochs=1"]
    full = weights(train(load_config(config_file, [*more, f"run.dir={tmp_path}/full"])))
    mixed = weights(train(load_config(config_file, [*more, f"train.precision={precision}"])))
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert_same(full, mixed, rtol=0.05, atol=0.01)


def test_hand_crafted_variant_trains_on_negated_captions(config_file):
    more = ["model.num_prompts=0", "data.caption_templates=['a photo of {}','{}']"]
    assert "prompt_no" not in weights(train(load_config(config_file, more)))


def test_clip_objective_trains_the_base_and_serves_clipn(config_file, tmp_path):
    more = ["train.objective=clip", "model.pretrained=null", f"run.dir={tmp_path}/base"]
    base = train(load_config(config_file, more))
    assert not any("_no" in name.split(".")[0] for name in weights(base))
    last = train(load_config(config_file, [f"model.pretrained={base}"]))
    assert torch.equal(weights(last)["visual.proj"], weights(base)["visual.proj"])


def test_weight_decay_spares_norms_biases_and_scalars():
    config = load_config_defaults()
    base, _ = build_base(architecture())
    decayed, spared = (group["params"] for group in build_optimizer(base, config).param_groups)
    names = {id(p): name for name, p in base.named_parameters()}
    assert {names[id(p)] for p in spared} >= {"logit_scale", "text.ln_final.weight", "text.ln_final.bias"}
    assert all(p.ndim >= 2 for p in decayed) and len(decayed) + len(spared) == len(names)


def load_config_defaults():
    from clipn.config.schema import TrainConfig

    return TrainConfig(warmup_steps=10, lr=1.0)


def test_learning_rate_warms_up_then_follows_a_cosine_to_zero():
    train_config = load_config_defaults()
    rates = [learning_rate(step, 110, train_config) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def metrics(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "itbo_yes", "itbo_no", "tso", "grad_norm")]


@pytest.mark.parametrize("source", ["pairs", "features"])
@pytest.mark.parametrize("size", [2, 4, 9])
def test_micro_batches_are_the_whole_batch(config_file, tmp_path, source, size):
    start = write_clipn(tmp_path / "start.pt")
    more = [f"data.source={source}", f"model.pretrained={start}", "train.eps=1e-2"]
    whole = train(load_config(config_file, [*more, f"run.dir={tmp_path}/whole"]))
    parts = train(load_config(config_file, [*more, f"train.micro_batch_size={size}"]))
    assert_same(weights(whole), weights(parts), rtol=2e-4, atol=2e-5)
    assert metrics(tmp_path / "run") == pytest.approx(metrics(tmp_path / "whole"), rel=1e-4)


def test_a_micro_batch_is_all_that_a_tower_sees_at_once(config_file, monkeypatch):
    sizes, read = [], clipn.training.objectives.text_features
    for module in (clipn.model.clipn, clipn.training.objectives):
        monkeypatch.setattr(module, "text_features", lambda *args: sizes.append(len(args[1])) or read(*args))
    train(load_config(config_file, ["train.micro_batch_size=4", "train.epochs=1"]))
    assert sizes == 3 * [4, 2, 4, 2], "the yes tower, and the no tower"


@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}])
def test_recomputed_activations_give_the_same_weights(config_file, tmp_path, monkeypatch, text):
    (tmp_path / "model.json").write_text(json.dumps(architecture(text=text)))
    start = write_clipn(tmp_path / "start.pt", text=text)
    more = [f"model.pretrained={start}", "train.epochs=1"]
    straight = train(load_config(config_file, [*more, f"run.dir={tmp_path}/straight"]))
    calls, again = [], torch.utils.checkpoint.checkpoint
    for module in (clipn.model.packed_text, open_clip.transformer):
        monkeypatch.setattr(module, "checkpoint", lambda *args, **more: calls.append(1) or again(*args, **more))
    recomputed = train(load_config(config_file, [*more, "train.grad_checkpointing=true"]))
    assert_same(weights(straight), weights(recomputed))
    assert len(calls) == 3, "one block, three steps"


def test_a_run_from_before_a_setting_was_there_goes_on(config_file):
    config = load_config(config_file)
    last = train(config)
    content = read_checkpoint(last)
    del content["config"]["features"], content["config"]["data"]["source"]
    write_checkpoint(content, last)
    assert train(config) == last
    with pytest.raises(ValueError, match=r"data\.source: 'pairs' -> 'features'"):
        train(load_config(config_file, ["data.source=features"]))


def test_a_run_whose_pairs_have_changed_does_not_go_on(config_file):
    train(load_config(config_file))
    write_shard(config_file.parent / "pairs.tar", numbered_samples(12))
    with pytest.raises(ValueError, match="12 pairs are there now, 20 when this run began"):
        train(load_config(config_file))
    write_shard(config_file.parent / "pairs.tar", numbered_samples(20, first=60))
    with pytest.raises(ValueError, match="20 pairs are there now, others when this run began"):
        train(load_config(config_file))


def test_a_run_goes_on_however_its_paths_are_written(config_file, monkeypatch):
    folder = config_file.parent
    last = train(load_config(config_file))
    monkeypatch.chdir(folder)
    (folder / "moved").mkdir()
    (folder / "pairs.tar").rename(folder / "moved/pairs.tar")
    words = ["run.dir=run", "data.shards=moved/pairs.tar", "model.pretrained=./clip.pt", "model.name=model.json"]
    assert train(load_config(config_file, words)).resolve() == last


def test_weights_that_are_not_finite_are_never_saved(config_file):
    config = load_config(config_file, ["train.lr=1e39", "train.checkpoint_every_steps=1"])
    with pytest.raises(FloatingPointError, match="no checkpoint was written before"):
        train(config)
    assert not last_checkpoint(config.run.dir).exists()
