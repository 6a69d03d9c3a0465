"""Training: what learns, resuming, every family of models, and the numbers of its variants."""

import json
import os
import signal
from pathlib import Path

import open_clip.transformer
import pytest
import torch
from conftest import architecture, write_clipn
from helpers import files, numbered_samples, write_shard
from test_model import FAMILIES

import clipn.model.no_text
import clipn.model.packed_text
import clipn.training.objectives
from clipn.config.loading import load_config
from clipn.config.schema import TrainConfig
from clipn.model.base import build_base
from clipn.model.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from clipn.runtime.signals import Interrupted
from clipn.training.loop import train
from clipn.training.objectives import OBJECTIVES, ClipnObjective, ClipObjective
from clipn.training.optimizer import build_optimizer, learning_rate

ROOT = Path(__file__).resolve().parent.parent


def weights(path):
    return read_checkpoint(path)["state_dict"]


def assert_same(first, second, rtol=0, atol=0):
    torch.testing.assert_close(second, first, rtol=rtol, atol=atol)


def metrics(folder) -> list[dict]:
    file = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_a_run_leaves_its_folder(finished_run, base_clip):
    content = read_checkpoint(last_checkpoint(finished_run))
    assert content["epoch"] == 2 and content["config"]["train"]["epochs"] == 2
    before = weights(base_clip / "clip.pt")
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in before.items() if "." in name)
    assert content["state_dict"]["prompt_no"].any()
    assert load_config(finished_run / "config.yaml").run.dir == str(finished_run)
    lines = metrics(finished_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * (line["itbo_yes"] + line["itbo_no"] + line["tso"]), rel=1e-4)
    keys = {"lr", "grad_norm", "prompt_norm", "pairs_per_s", "skipped", "left_out", "tso", "epoch"}
    assert keys | {f"logit_{kind}_{pair}" for kind in ("yes", "no") for pair in ("matched", "unmatched")} <= {*lines[0]}
    assert files(finished_run / "checkpoints") == ["epoch_1.pt", "epoch_2.pt", "last.pt", "step_4.pt", "step_6.pt"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(config_file, straight, tmp_path):
    assert_same(weights(train(load_config(config_file))), straight["clipn"])
    other = train(load_config(config_file, [f"run.dir={tmp_path}/other", "run.seed=1"]))
    assert not torch.equal(weights(other)["prompt_no"], straight["clipn"]["prompt_no"])


@pytest.mark.parametrize("objective, stop_at", [("clipn", 1), ("clipn", 4), ("clip", 3)])
def test_a_stopped_run_resumes_to_the_same_bits(config_file, straight, monkeypatch, objective, stop_at):
    config = load_config(config_file, [f"train.objective={objective}"])
    kind, steps = OBJECTIVES[objective], []
    prepare = kind.prepare

    def stop_in_step(self, batch, step):
        steps.append(step)
        if step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, batch, step)

    monkeypatch.setattr(kind, "prepare", stop_in_step)
    with pytest.raises(Interrupted, match=f"after step {stop_at} of 6; .*the same command resumes"):
        train(config)
    assert_same(weights(train(config)), straight[objective])
    assert steps == [0, 1, 2, 3, 4, 5], "no step is taken twice"
    assert [line["step"] for line in metrics(config.run.dir)] == [1, 2, 3, 4, 5, 6]


def test_a_base_resumes_from_moments_in_another_memory_format(config_file, straight, monkeypatch):
    """Convolutions learn in channels_last; a checkpoint may hold their moments row by row."""
    config = load_config(config_file, ["train.objective=clip"])
    monkeypatch.setattr(ClipObjective, "after_step", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.undo()
    for path in Path(config.run.dir).glob("checkpoints/*.pt"):
        content = read_checkpoint(path)
        moments = content["training"]["optimizer"]["state"].values()
        assert any(not state["exp_avg"].is_contiguous() for state in moments)
        for state in moments:
            state |= {name: value.contiguous() for name, value in state.items()}
        path.unlink()
        write_checkpoint(content, path)
    assert_same(weights(train(config)), straight["clip"])


def test_another_run_in_the_folder_is_not_mixed_or_overwritten(config_file, base_clip, finished):
    new = f"run.dir={config_file.parent}/new"
    for words, error, message in (
        (["train.lr=2e-3"], ValueError, r"train\.lr: 0\.001 -> 0\.002"),
        (["train.resume=never"], ValueError, "train.resume=never"),
        (["train.resume=missing.pt", new], FileNotFoundError, r"missing\.pt"),
        ([f"train.resume={base_clip}/clip.pt", new], ValueError, "no state of a training run"),
    ):
        with pytest.raises(error, match=message):
            train(load_config(config_file, words))


def test_a_finished_run_from_before_a_setting_existed_trains_no_more(config_file, finished, monkeypatch):
    monkeypatch.setattr(ClipnObjective, "prepare", None)
    last = last_checkpoint(finished.run.dir)
    content = read_checkpoint(last)
    del content["config"]["features"], content["config"]["data"]["source"]
    write_checkpoint(content, last)
    assert train(finished) == last
    with pytest.raises(ValueError, match=r"data\.source: 'pairs' -> 'features'"):
        train(load_config(config_file, ["data.source=features"]))


def test_a_run_of_an_older_format_is_refused_if_it_is_unfinished(finished):
    folder = Path(finished.run.dir) / "checkpoints"
    content = {name: read_checkpoint(folder / f"{name}.pt") for name in ("epoch_1", "step_6")}
    for parts in content.values():
        del parts["training"]["format"]
    write_checkpoint(content["step_6"], folder / "step_6.pt")
    assert train(finished) == folder / "last.pt"
    for path in folder.iterdir():
        path.unlink()
    write_checkpoint(content["epoch_1"], folder / "step_3.pt")
    with pytest.raises(ValueError, match=r"step_3\.pt: of an unfinished run by a version .* choose another run\.dir"):
        train(finished)


def test_a_run_whose_pairs_have_changed_does_not_resume(finished):
    for samples, message in ((numbered_samples(12), "12 pairs .*, 20"), (numbered_samples(20), "20 pairs .*, others")):
        write_shard(Path(finished.data.shards), samples)
        with pytest.raises(ValueError, match=f"{message} when this run began"):
            train(finished)


def test_a_run_resumes_however_its_paths_are_written(config_file, base_clip, finished, monkeypatch):
    monkeypatch.chdir(config_file.parent)
    Path("moved").mkdir()
    Path("pairs.tar").rename("moved/pairs.tar")
    clip = os.path.relpath(base_clip)
    words = ["run.dir=run", "data.shards=moved/pairs.tar", f"model.pretrained={clip}/clip.pt"]
    last = train(load_config(config_file, [*words, f"model.name={clip}/model.json"]))
    assert last.resolve() == last_checkpoint(finished.run.dir)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("objective", ["clipn", "clip"])
def test_mixed_precision_is_near_full_precision(config_file, straight, precision, objective):
    mixed = weights(train(load_config(config_file, [f"train.objective={objective}", f"train.precision={precision}"])))
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert_same(straight[objective], mixed, rtol=0.05, atol=0.01)


def test_the_hand_crafted_variant_trains_on_negated_captions(config_file):
    words = ["model.num_prompts=0", "data.caption_templates=['a photo of {}','{}']", "train.epochs=1"]
    assert "prompt_no" not in weights(train(load_config(config_file, words)))


def test_the_clip_objective_trains_the_base_and_serves_clipn(config_file, tmp_path):
    words = ["train.objective=clip", "model.pretrained=null", f"run.dir={tmp_path}/base", "train.epochs=1"]
    base = train(load_config(config_file, words))
    assert not any("_no" in name.split(".")[0] for name in weights(base))
    last = train(load_config(config_file, [f"model.pretrained={base}", "train.epochs=1"]))
    assert torch.equal(weights(last)["visual.proj"], weights(base)["visual.proj"])


TIMM = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
TRAINABLE = FAMILIES | {"timm": {**architecture(), "vision_cfg": TIMM | {"image_size": 64}}}


@pytest.mark.parametrize("family", TRAINABLE)
def test_every_family_trains(config_file, tmp_path, family):
    (tmp_path / "model.json").write_text(json.dumps(TRAINABLE[family]))
    words = [f"model.name={tmp_path}/model.json", "model.pretrained=null", "train.epochs=1", "data.num_pairs=12"]
    train(load_config(config_file, words))
    first, second = metrics(tmp_path / "run")
    assert first["logit_yes_matched"] == pytest.approx(first["logit_no_matched"], rel=1e-3), "n starts as a copy of g"
    assert second["step"] == 2 and all(value is not None for value in second.values()), "every number is finite"
    if family in ("modified resnet", "nonscalar logit scale"):
        train(load_config(config_file, [*words, f"run.dir={tmp_path}/clip", "train.objective=clip"]))
        assert metrics(tmp_path / "clip")[1]["logit_scale"] > 1


def test_weight_decay_spares_norms_biases_and_scalars():
    base, _ = build_base(architecture())
    groups = build_optimizer(base, TrainConfig()).param_groups
    names = {p: name for name, p in base.named_parameters()}
    decayed, spared = ([names[p] for p in group["params"]] for group in groups)
    assert {"logit_scale", "text.ln_final.weight", "text.ln_final.bias"} <= {*spared}
    assert "text.text_projection" in decayed and {*decayed, *spared} == {*names.values()}
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


def test_learning_rate_warms_up_then_follows_a_cosine_to_zero():
    rates = [learning_rate(step, 110, TrainConfig(warmup_steps=10, lr=1.0)) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("source, sizes", [("pairs", [2, 4, 9]), ("features", [4])])
def test_micro_batches_are_the_whole_batch(config_file, tmp_path, source, sizes):
    start = write_clipn(tmp_path / "start.pt")
    words = [f"data.source={source}", f"model.pretrained={start}", "train.eps=1e-2"]
    whole = weights(train(load_config(config_file, [*words, f"run.dir={tmp_path}/whole"])))
    for size in sizes:
        own = [f"train.micro_batch_size={size}", f"run.dir={tmp_path}/{size}"]
        assert_same(whole, weights(train(load_config(config_file, [*words, *own]))), rtol=2e-4, atol=2e-5)
        for name in ("loss", "itbo_yes", "itbo_no", "tso", "grad_norm"):
            expected = [line[name] for line in metrics(tmp_path / "whole")]
            assert [line[name] for line in metrics(tmp_path / str(size))] == pytest.approx(expected, rel=1e-4)


def test_a_micro_batch_is_all_that_a_tower_reads_at_once(config_file, monkeypatch):
    sizes, read = [], clipn.training.objectives.text_features
    for module in (clipn.model.clipn, clipn.model.no_text):
        monkeypatch.setattr(module, "text_features", lambda *args: sizes.append(len(args[1])) or read(*args))
    train(load_config(config_file, ["train.micro_batch_size=4", "train.epochs=1"]))
    assert sizes == 3 * [4, 2, 4, 2], "the yes tower, and the no tower"


@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}])
def test_recomputed_activations_give_the_same_weights(config_file, tmp_path, monkeypatch, text):
    (tmp_path / "model.json").write_text(json.dumps(architecture(text=text)))
    start = write_clipn(tmp_path / "start.pt", text=text)
    words = [f"model.name={tmp_path}/model.json", f"model.pretrained={start}", "train.epochs=1"]
    straight = train(load_config(config_file, [*words, f"run.dir={tmp_path}/straight"]))
    calls, again = [], torch.utils.checkpoint.checkpoint
    for module in (clipn.model.packed_text, open_clip.transformer):
        monkeypatch.setattr(module, "checkpoint", lambda *args, **options: calls.append(1) or again(*args, **options))
    recomputed = train(load_config(config_file, [*words, "train.grad_checkpointing=true"]))
    assert_same(weights(straight), weights(recomputed))
    assert len(calls) == 3, "one block, three steps"
