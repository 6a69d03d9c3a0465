"""A whole run as its config describes it: world, base, training, evaluation, report; or the evaluation alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipn.config.loading import base_config, load_config, to_dict
from clipn.config.schema import Config
from clipn.data.pairs import open_pairs
from clipn.evaluation.adversarial import evaluate_adversarial
from clipn.evaluation.correlation import correlate
from clipn.evaluation.evaluate import check_checkpoints, check_evaluation, evaluate
from clipn.evaluation.record import RECORD, write_record
from clipn.evaluation.results import Evaluation, join
from clipn.features.pairs import pair_features
from clipn.model.base import get_tokenizer
from clipn.model.checkpoint import last_checkpoint
from clipn.model.clipn import configured_model
from clipn.report.write import summary, write_adversarial, write_correlation, write_report
from clipn.runtime.console import start_log
from clipn.runtime.distributed import choose_device, is_main, process_group
from clipn.toy.world import make_world
from clipn.training.loop import train


def run_training(path: str, overrides: list[str]) -> None:
    """Train what a config file with these `key=value` overrides describes, and evaluate it if it has an eval.id.

    First it makes the config's world and trains its `base`, if it has them. Under torchrun it uses every rank. The same
    call resumes a stopped run. Raises what training and evaluation raise; errors in `eval` before the training.
    """
    config = load_config(path, overrides)
    with process_group(choose_device(config.run.device)):
        runs = each_seed(path, overrides)
        check_checkpoints(config)
        for run in runs:
            check_evaluation(run, world_made=False)
        for run in runs:
            train_one(run)
        evaluation = evaluate_all(config, runs)
        if evaluation:
            _show(config, evaluation)
        elif is_main():
            print(f"done: {', '.join(str(last_checkpoint(run.run.dir)) for run in runs)}")


def run_eval(path: str, overrides: list[str]) -> None:
    """Evaluate the checkpoints that a config file with these `key=value` overrides names; raises as `evaluate` does."""
    with _opened(path, overrides) as config:
        evaluation = evaluate(config)
        _write(config, evaluation)
        _show(config, evaluation)


def run_adversarial(path: str, overrides: list[str]) -> None:
    """Write adversarial versions of the OOD images of a config, and evaluate on them; the same call resumes.

    Raises as `evaluate_adversarial` does.
    """
    with _opened(path, overrides) as config:
        results, sets = evaluate_adversarial(config)
        if is_main():
            folder = Path(config.run.dir) / "adversarial"
            write_adversarial(folder, results, sets)
            print((folder / "results.md").read_text(encoding="utf-8"))
            print(f"done: {folder}/results.md and .csv; samples.png and folders of images beside them")


def run_correlation(path: str, overrides: list[str]) -> None:
    """Correlate ID accuracy and AUROC over the base CLIPs of a config's eval.checkpoints; raises as `correlate` does.

    The same call resumes: features are kept.
    """
    with _opened(path, overrides) as config:
        points, fits = correlate(config)
        if is_main():
            folder = Path(config.run.dir) / "correlation"
            write_correlation(folder, points, fits)
            print((folder / "results.md").read_text(encoding="utf-8"))
            print(f"done: {folder}/results.md, results.csv, fits.csv and scatter.png")


def run_extraction(path: str, overrides: list[str]) -> None:
    """Encode the pairs of a config into features.dir, for data.source=features; training does the same if needed.

    The same call resumes. Raises what opening pairs and writing features raise.
    """
    config = load_config(path, overrides)
    device = choose_device(config.run.device)
    with process_group(device):
        start_log(config.run.dir)
        pairs = open_pairs(config.data)
        model = configured_model(config.model, device)
        pair_features(config, model, get_tokenizer(model.architecture), pairs)
        if is_main():
            print(f"done: features in {config.features.dir}/pairs; train with data.source=features")


def each_seed(path: str, overrides: list[str]) -> list[Config]:
    """The config itself, or for run.seeds one per seed, in run.dir/seed_N."""
    config = load_config(path, overrides)
    folder = Path(config.run.dir)
    own = [[f"run.seed={seed}", f"run.dir={folder / f'seed_{seed}'}", "run.seeds=[]"] for seed in config.run.seeds]
    return [load_config(path, [*overrides, *words]) for words in own] or [config]


def train_one(config: Config) -> None:
    """Make the world, check the evaluation's settings on it, and train the base and the model of one run."""
    start_log(config.run.dir)
    make_world(config.world)
    check_evaluation(config)
    base = base_config(config)
    if base:
        start_log(base.run.dir)
        train(base)
        start_log(config.run.dir)
    train(config)


def evaluate_all(config: Config, runs: list[Config]) -> Evaluation | None:
    """Evaluate the trained runs and write their reports, and one report of all seeds, if the config has an eval.id."""
    if config.eval.id is None:
        return None
    evaluations = []
    for run in runs:
        start_log(run.run.dir)
        evaluations.append(evaluate(run))
        _write(run, evaluations[-1])
    joined = join(evaluations)
    if config.run.seeds:
        _write(config, joined)
    return joined


@contextmanager
def _opened(path: str, overrides: list[str]) -> Iterator[Config]:
    """The config of an evaluation, with its process group, log and world. Raises ValueError without an eval.id."""
    config = load_config(path, overrides)
    if config.eval.id is None:
        raise ValueError(f"{path}: eval.id: names no image set to evaluate on")
    with process_group(choose_device(config.run.device)):
        start_log(config.run.dir)
        make_world(config.world)
        yield config


def _write(config: Config, evaluation: Evaluation) -> None:
    """Write the report of an evaluation, and the record of its weights, into the run folder."""
    if is_main():
        (Path(config.run.dir) / RECORD).unlink(missing_ok=True)  # an old record never describes new results
        write_report(Path(config.run.dir), evaluation, config.eval.bootstrap)
        write_record(config.run.dir, evaluation.weights_sha256, to_dict(config)["eval"], evaluation.class_names)


def _show(config: Config, evaluation: Evaluation) -> None:
    if is_main():
        print(summary(evaluation.results))
        print(f"done: {config.run.dir}/report.html; tables in results.md, .csv and .tex beside it")
