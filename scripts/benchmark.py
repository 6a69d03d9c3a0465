"""Time CLIPN's training step and inference: python scripts/benchmark.py [--model ViT-B-16] [--batch-size 32] ...

Modes: plain     the method without optimisations: every tower over all 77 positions, and a loss of two logits per pair
       online    the step of data.source=pairs, without reading the pairs
       features  the step of data.source=features
       adapter   the same with model.no_tower=adapter and model.bias=true, rows drawn at random
       extract   encoding pairs for data.source=features, from memory
       evaluate  encoding images for `clipn eval`, from memory
       loader    reading, decoding and cropping pairs, and a webdataset pipeline beside it; needs no model
       rescore   every score of 90 000 image features and 1 000 classes
       probe     the probe of PLP on 50 000 x 768 outputs, 100 classes, 100 epochs, batch 256
       sklearn   scikit-learn's LogisticRegression (lbfgs) on the same outputs: another solver of the same objective

Models have random weights; images and captions are random, with caption lengths distributed as in CC3M (mean 12 tokens
with the start and end tokens). The modes run in turn after a warm-up. Printed are medians, and ratios to plain.
Utilisation is the model's FLOPs, as torch counts them, relative to a large matrix product on the same device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.config.checks import PRECISIONS
from clipn.config.evaluation import ProbeConfig
from clipn.config.schema import Config, ModelConfig, RunConfig, TrainConfig
from clipn.data.image_sets import ImageSet
from clipn.data.shards import CAUSES
from clipn.evaluation.evaluate import score_features
from clipn.features.columns import DenseColumn
from clipn.features.pairs import pair_encoder
from clipn.methods.probe import Probe, fit_probe
from clipn.model.base import context_length
from clipn.model.head import Head
from clipn.model.precision import DTYPES, autocast
from clipn.runtime.console import fail_in_one_line
from clipn.runtime.distributed import choose_device
from clipn.scores import SCORES
from clipn.training.loop import Run
from clipn.training.objectives import ClipnObjective
from scripts.benchmark_loader import time_loaders

STEPS = ("plain", "online", "features")
TIMED = (*STEPS, "adapter", "extract", "evaluate")
FITS = ("probe", "sklearn")
MODES = (*TIMED, "loader", "rescore", *FITS)
CC3M_PAIRS, ADAPTER_ROWS = 2_891_445, 2**16
RESCORED_IMAGES, RESCORED_CLASSES = 90_000, 1000
PROBE_IMAGES, PROBE_WIDTH, PROBE_CLASSES, PROBE_EPOCHS = 50_000, 768, 100, 100


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command; see the module's docstring. Returns the content of --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name, or a JSON model config")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[32])
    parser.add_argument("--caption-length", type=int, help="tokens of every caption, instead of CC3M's spread")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each mode")
    parser.add_argument("--compile", action="store_true", help="train.compile=true, for online and features")
    parser.add_argument("--grad-checkpointing", action="store_true", help="train.grad_checkpointing=true")
    parser.add_argument("--micro-batch-size", type=int, help="train.micro_batch_size")
    parser.add_argument("--workers", type=int, default=2, help="of the mode loader")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    arguments = parser.parse_args(argv)
    if min(arguments.batch_size) < 2 or arguments.rounds < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} --rounds {arguments.rounds}: expected 2 and 1 or more")
    if arguments.workers < 0:
        raise ValueError(f"--workers {arguments.workers}: expected 0 or more")
    if arguments.json and not arguments.json.parent.is_dir():
        raise FileNotFoundError(f"--json {arguments.json}: no such folder: {arguments.json.parent}")
    device = choose_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    peak = matmul_flops(device, precision)
    print(
        f"{arguments.model} on {device_name(device)}, {precision}: a matrix product runs at {peak / 1e12:.2f} TFLOP/s"
    )
    results = []
    for batch_size in arguments.batch_size:
        results += measure(arguments, device, precision, batch_size, peak)
    if "loader" in arguments.mode:
        for result in time_loaders(arguments.rounds, arguments.workers):
            results.append(result)
            print_row(result)
    if "rescore" in arguments.mode:
        results.append(rescore(device, arguments.rounds))
        print_row(results[-1])
    for mode in FITS:
        if mode in arguments.mode:
            results.append(fit_once(mode, device))
            print_row(results[-1])
    report = {"model": arguments.model, "device": device_name(device), "precision": precision}
    report |= {"torch": torch.__version__, "matmul_flops_per_s": peak, "results": results}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))
        print(f"done: {arguments.json}")
    return report


def measure(
    arguments: argparse.Namespace, device: torch.device, precision: str, batch_size: int, peak: float
) -> list[dict[str, Any]]:
    """Results of every mode of a batch, at one batch size."""
    if not set(arguments.mode) & {*TIMED}:
        return []
    work = build_work(arguments, device, precision, batch_size)
    work = {mode: work[mode] for mode in TIMED if mode in arguments.mode}
    flops = {mode: count_flops(step) for mode, step in work.items()}  # a first warm-up
    times: dict[str, list[float]] = {mode: [] for mode in work}
    memory: dict[str, dict[str, int]] = {}
    for turn in range(arguments.rounds + 1):
        for mode, step in work.items():
            seconds, memory[mode] = timed(step, device)
            if turn:  # the first turn is a second warm-up
                times[mode].append(seconds)
    results = []
    for mode, seconds in times.items():
        median = statistics.median(seconds)
        results.append(
            {
                "mode": mode,
                "batch_size": batch_size,
                "pairs_per_s": batch_size / median,
                "ms_per_step": 1000 * median,
                **memory[mode],
                "model_flops_per_step": flops[mode],
                "utilisation": flops[mode] / median / peak,
            }
        )
        if mode in STEPS and "plain" in times:
            results[-1]["speed_up_over_plain"] = statistics.median(times["plain"]) / median
        if mode == "adapter" and "features" in times:
            results[-1]["speed_up_over_features"] = statistics.median(times["features"]) / median
        if mode in ("features", "adapter"):
            results[-1]["minutes_for_10_epochs_of_cc3m"] = 10 * CC3M_PAIRS / results[-1]["pairs_per_s"] / 60
        print_row(results[-1])
    return results


def build_work(
    arguments: argparse.Namespace, device: torch.device, precision: str, batch_size: int
) -> dict[str, Callable[[], None]]:
    """The step of each mode, on one random batch."""
    train = TrainConfig(
        batch_size=batch_size,
        precision=precision,
        compile=arguments.compile,
        grad_checkpointing=arguments.grad_checkpointing,
        micro_batch_size=arguments.micro_batch_size,
    )
    config = Config(run=RunConfig(device=arguments.device), model=ModelConfig(name=arguments.model), train=train)
    torch.manual_seed(0)
    objective = ClipnObjective(config, device)
    run = Run(config, objective, device)
    run.steps_per_epoch = 10**6
    size, dim = objective.preprocess["size"], objective.architecture["embed_dim"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randint(256, (batch_size, 3, height, width), dtype=torch.uint8)
    images = objective.to_input(pixels)
    tokens = random_captions(batch_size, context_length(objective.architecture), arguments.caption_length)
    counters = {"skipped": torch.zeros(1, len(CAUSES), dtype=torch.long), "number": torch.arange(batch_size)}
    stored = {name: F.normalize(torch.randn(batch_size, dim, device=device), dim=-1).half() for name in ("f", "g")}
    features = {"image_features": stored["f"], "yes_features": stored["g"]}
    encode = pair_encoder(objective.model, precision, torch.float16)
    adapter = adapter_step(config, device, dim, counters) if "adapter" in arguments.mode else None

    @torch.inference_mode()
    def evaluate() -> None:
        with autocast(device, precision):
            objective.model.encode_image(images)

    @torch.inference_mode()
    def extract() -> None:
        encode({"image": pixels[:, None], "tokens": tokens[:, None]})

    return {
        "plain": lambda: plain_step(objective, run.optimizer, precision, images, tokens.to(device)),
        "online": lambda: run.take_step({"image": pixels, "tokens": tokens, **counters}),
        "features": lambda: run.take_step({**features, "tokens": tokens, **counters}),
        "adapter": adapter,
        "extract": extract,
        "evaluate": evaluate,
    }


def adapter_step(config: Config, device: torch.device, dim: int, counters: dict[str, Tensor]) -> Callable[[], None]:
    """The step of an adapter, which draws its batch from stored features."""
    config = replace(config, model=replace(config.model, no_tower="adapter", bias=True))
    run = Run(config, ClipnObjective(config, device), device)
    run.steps_per_epoch = 10**6
    parts = [{name: F.normalize(torch.randn(ADAPTER_ROWS, 1, dim), dim=-1).half() for name in ("image", "yes")}]
    columns = {f"{name}_features": DenseColumn(parts, name, device) for name in parts[0]}

    def step() -> None:
        rows = torch.randint(ADAPTER_ROWS, (config.train.batch_size,))
        run.take_step({name: column.take(rows, 0) for name, column in columns.items()} | counters)

    return step


def plain_step(
    objective: ClipnObjective, optimizer: torch.optim.Optimizer, precision: str, images: Tensor, tokens: Tensor
) -> None:
    """One training step of the method without optimisations."""
    model, no_text = objective.model, objective.model.no_text
    with autocast(images.device, precision):
        with torch.no_grad():
            image = F.normalize(model.base.encode_image(images).float(), dim=-1)
            yes = F.normalize(model.base.text(tokens).float(), dim=-1)
        mean = no_text.prompts.mean(dim=0, keepdim=True)
        choice = torch.randint(len(no_text.prompts) + 1, (len(tokens),), device=images.device)
        added = torch.cat([no_text.prompts, mean])[choice]
        hook = no_text.tower.token_embedding.register_forward_hook(lambda module, inputs, embedded: embedded + added)
        no = F.normalize(no_text.tower(tokens).float(), dim=-1)
        hook.remove()
    scale = model.logit_scale.exp()
    logits = torch.stack([scale * image @ yes.T, scale * image @ no.T], dim=-1)  # [N, N, 2]
    log_probabilities = logits.log_softmax(dim=-1)
    matched = torch.eye(len(images), dtype=torch.bool, device=images.device)
    itbo = -log_probabilities[..., 0][matched].mean() - log_probabilities[..., 1][~matched].mean()
    tso = (2 - (2 - 2 * (yes * no).sum(dim=-1) + 1e-4).sqrt()).mean()
    optimizer.zero_grad(set_to_none=True)
    (0.5 * (itbo + tso)).backward()
    optimizer.step()


def random_captions(count: int, context: int, length: int | None) -> Tensor:
    """[count, context] token ids: a start token, random ones, the end token, padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = (2 + torch.empty(count).log_normal_(2.2, 0.45, generator=generator).round().long()).clamp(3, context)
    if length:
        lengths = torch.full((count,), min(length, context))
    tokens = torch.randint(1, 49405, (count, context), generator=generator)
    tokens[:, 0] = 49406
    tokens[torch.arange(count), lengths - 1] = 49407
    return tokens.masked_fill(torch.arange(context) >= lengths[:, None], 0)


def rescore(device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds for every score and decision of cached features."""
    generator = torch.Generator().manual_seed(0)
    features, yes, no = (
        F.normalize(torch.randn(count, 512, generator=generator), dim=-1)
        for count in (RESCORED_IMAGES, RESCORED_CLASSES, RESCORED_CLASSES)
    )
    head = Head(yes, no).to(device)
    images = ImageSet("random", Path(), [], [], [])
    timings = [timed(lambda: score_features(head, images, features, list(SCORES)), device) for _ in range(rounds + 1)]
    return {
        "mode": "rescore",
        "batch_size": RESCORED_IMAGES,
        "classes": RESCORED_CLASSES,
        "scores": list(SCORES),
        "seconds": statistics.median(seconds for seconds, _ in timings[1:]),
        **timings[-1][1],
    }


def fit_once(mode: str, device: torch.device) -> dict[str, Any]:
    """Seconds, objective and training accuracy of one fit of the probe, or of scikit-learn's optimum."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(PROBE_CLASSES, (PROBE_IMAGES,), generator=generator)
    tower = torch.randn(PROBE_CLASSES, PROBE_WIDTH, generator=generator)[labels]
    tower += 6 * torch.randn(PROBE_IMAGES, PROBE_WIDTH, generator=generator)
    tower *= torch.arange(1, PROBE_WIDTH + 1) ** -0.5  # correlated dimensions, as those of an image tower
    rotation = torch.linalg.qr(torch.randn(PROBE_WIDTH, PROBE_WIDTH, generator=generator)).Q
    tower = (tower @ rotation).half().to(device)
    settings = ProbeConfig(epochs=PROBE_EPOCHS)
    result: dict[str, Any] = {"mode": mode, "batch_size": PROBE_IMAGES}
    if mode == "probe":
        fits = []
        seconds, memory = timed(lambda: fits.append(fit_probe(tower, labels, PROBE_CLASSES, settings)), device)
        probe = fits[0]
    else:
        mean, std = tower.float().mean(dim=0), tower.float().std(dim=0)
        ones = torch.ones(PROBE_IMAGES, 1)
        x = torch.cat([((tower.float() - mean) / std).cpu(), ones], dim=1).numpy()
        inverse = 1 / (settings.weight_decay * PROBE_IMAGES)
        solver = LogisticRegression(C=inverse, fit_intercept=False, max_iter=1000)
        seconds, memory = timed(lambda: solver.fit(x, labels.numpy()), torch.device("cpu"))
        coefficients = torch.from_numpy(solver.coef_).float().to(device)
        probe = Probe(coefficients[:, :-1], coefficients[:, -1], mean, std)
    logits, squares = probe.logits(tower).cpu(), probe.weight.square().sum() + probe.bias.square().sum()
    objective = float(F.cross_entropy(logits, labels)) + settings.weight_decay / 2 * float(squares)
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    return result | {"seconds": seconds, "objective": objective, "accuracy": accuracy, **memory}


def timed(step: Callable[[], Any], device: torch.device) -> tuple[float, dict[str, int]]:
    """Seconds of a step, and memory at its peak and before it: GPU tensors, or the whole process on Linux."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = timed_alone(step, device)
        return seconds, {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "memory_before_bytes": before}
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    except OSError:
        return timed_alone(step), {}
    before = _process_memory("VmRSS")
    seconds = timed_alone(step)
    return seconds, {"peak_memory_bytes": _process_memory("VmHWM"), "memory_before_bytes": before}


def _process_memory(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def timed_alone(step: Callable[[], Any], device: torch.device | None = None) -> float:
    start = time.perf_counter()
    step()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def count_flops(step: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product: the upper limit of this device."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=DTYPES.get(precision)) for _ in range(2))
    seconds = [timed_alone(lambda: left @ right, device) for _ in range(6)][1:]
    return 2 * size**3 / statistics.median(seconds)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def print_row(result: dict[str, Any]) -> None:
    memory = ""
    if "peak_memory_bytes" in result:
        peak, before = (result[f"{name}_bytes"] / 2**30 for name in ("peak_memory", "memory_before"))
        memory = f"peak {peak:.2f} GiB ({before:.2f} before)"
    if result["mode"] == "rescore":
        sizes = f"{result['batch_size']} images x {result['classes']} classes, {len(result['scores'])} scores"
        print(f"rescore   {sizes}: {result['seconds']:.2f} s, {memory}")
        return
    if result["mode"] in FITS:
        fit = f"objective {result['objective']:.4f}, accuracy {100 * result['accuracy']:.1f} %"
        print(f"{result['mode']:9} {result['batch_size']} images: {result['seconds']:.1f} s, {fit}, {memory}")
        return
    words = [f"{result['mode']:9} batch {result['batch_size']}: {result['pairs_per_s']:9.1f} pairs/s"]
    words += [f"{result['ms_per_step']:9.1f} ms", memory]
    if "utilisation" in result:
        words.append(f"utilisation {100 * result['utilisation']:.0f} %")
    if "workers" in result:
        words.append(f"{result['workers']} workers, {result['bytes_per_photo'] / 1e3:.0f} kB a photo")
    texts = {
        "speed_up_over_webdataset": "{:.2f} x webdataset",
        "speed_up_over_plain": "{:.1f} x plain",
        "speed_up_over_features": "{:.1f} x features",
        "minutes_for_10_epochs_of_cc3m": "10 epochs of CC3M: {:.0f} min",
    }
    words += [text.format(result[key]) for key, text in texts.items() if key in result]
    print(", ".join(word for word in words if word))


if __name__ == "__main__":
    fail_in_one_line(main)
