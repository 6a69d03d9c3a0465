"""A run's checkpoints, each of them whole, and the way back into the run.

checkpoints/step_N.pt    the newest `train.keep_checkpoints`
checkpoints/epoch_N.pt   every `train.keep_every_epochs`-th epoch's, and the last one's
checkpoints/last.pt      the newest of all
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clipn.config.loading import load_config, to_dict
from clipn.config.schema import Config, TrainConfig
from clipn.model.checkpoint import checkpoint_folder, read_checkpoint, write_checkpoint
from clipn.runtime.distributed import gather_values
from clipn.runtime.files import link_or_copy
from clipn.training.run_log import metrics_file

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

log = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not change what is computed.
RESUME_MAY_CHANGE = {
    "data.shards",  # the pairs themselves are compared, wherever they are
    "data.root",
    "run.dir",
    "run.device",
    "run.seeds",
    "data.workers",
    "data.index_dir",
    "data.max_bad_fraction",
    "features.dir",
    "features.batch_size",
    "features.part_size",
    "train.micro_batch_size",
    "train.grad_checkpointing",
    "train.compile",
    "train.resume",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.keep_every_epochs",
    "train.log_every_steps",
}

# What a checkpoint holds of a run's state.
_STATE = {"step", "pairs", "fingerprint", "ranks", "optimizer", "scaler", "skipped", "skipped_steps"}


@contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Hold a run's folder against another process that trains in it. Raises ValueError where one does."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(run_dir) / ".lock", "a") as file:
        try:
            if fcntl:  # lockf, which workers do not inherit: they may outlive a killed run for a moment
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"run.dir={str(run_dir)!r}: another process is training there; wait, or stop it"
            ) from error
        yield


class Checkpoints:
    """Writes a run's checkpoints in the background: training waits for a copy in memory only. For rank 0.

    A context: at its end, also after an error, what was begun is on disk. Raises OSError when it could not be written.
    """

    def __init__(self, run_dir: str | Path, train: TrainConfig) -> None:
        self.folder, self.train = checkpoint_folder(run_dir), train
        self.background, self.under_way = ThreadPoolExecutor(1, "checkpoint"), Future()
        self.under_way.set_result(None)
        for left_over in self.folder.glob("*.partial"):  # of a run that was killed while it wrote
            left_over.unlink(missing_ok=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.background.shutdown()
        if not error:
            self.wait()

    def write(self, content: dict[str, Any], step: int, epoch: int | None) -> None:
        """Take a copy, and write it once the one before is written. `epoch`: the epoch that ends here, to be kept."""
        self.wait()
        self.under_way = self.background.submit(self._write, _copy(content), step, epoch)

    def check(self) -> None:
        """Raises OSError when a checkpoint could not be written."""
        if self.under_way.done():
            self.under_way.result()

    def wait(self) -> None:
        """Return when all is on disk. Raises OSError when it could not be written."""
        self.under_way.result()

    def _write(self, content: dict[str, Any], step: int, epoch: int | None) -> None:
        path = self.folder / f"step_{step}.pt"
        write_checkpoint(content, path)
        if epoch:
            link_or_copy(path, self.folder / f"epoch_{epoch}.pt")
        link_or_copy(path, self.folder / "last.pt")
        newest_first = [old for old in _by_number(self.folder, "step") if _number(old) <= step]
        for old in newest_first[self.train.keep_checkpoints :]:
            old.unlink()


def find_resume(config: Config) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any.

    Raises FileNotFoundError for one that is asked for and not there; ValueError for a folder whose checkpoints are all
    broken, and where going on would mix two runs.
    """
    resume, folder = config.train.resume, checkpoint_folder(config.run.dir)
    if resume == "never" and any(folder.glob("*.pt")):
        raise ValueError(f"train.resume=never: {folder} holds a run already; choose another run.dir, or delete it")
    path, content = newest_checkpoint(folder)  # after a stop, a run goes on from its own
    found = gather_values(path and path.name)
    if len(set(found)) > 1:
        raise ValueError(f"run.dir: the ranks find {found} in {folder}; it must be a folder that all machines share")
    if not content and resume not in ("auto", "never"):
        path, content = Path(resume), read_checkpoint(resume)
    if not content:
        _refuse_another_run(config)
        return None
    if "config" not in content or not (content.get("training") or {}).keys() >= _STATE:
        raise ValueError(f"{path}: holds weights but no state of a training run to resume; use it as model.pretrained")
    _compare_settings(content["config"], config, f"{path} is of a run")
    log.info("going on from %s", path)
    return content


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The newest whole checkpoint of a folder. Raises ValueError when there are some and none is whole."""
    paths = [*_by_number(folder, "step"), *folder.glob("last.pt"), *_by_number(folder, "epoch")]
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            log.warning("%s; trying an older one", error)
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints can be read; move them away to start anew")
    return None, None


def _refuse_another_run(config: Config) -> None:
    """Raises ValueError when the folder holds the beginning of a run with other settings, without a checkpoint yet."""
    file, metrics = Path(config.run.dir) / "config.yaml", metrics_file(config.run.dir)
    if file.is_file() and metrics.is_file() and metrics.stat().st_size:
        _compare_settings(to_dict(load_config(file)), config, f"{file.parent} holds the beginning of a run")


def _compare_settings(before: dict[str, Any], config: Config, what: str) -> None:
    # A setting that is newer than the run had its default then.
    then, now = _flatten(to_dict(Config())) | _flatten(before), _flatten(to_dict(config))
    sections = ("run.", "model.", "data.", "features.", "train.")
    changes = [
        f"{key}: {then.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if key.startswith(sections)
        and key not in RESUME_MAY_CHANGE
        and _resolved_path(then.get(key)) != _resolved_path(value)
    ]
    if changes:
        raise ValueError(f"{what} with other settings: {'; '.join(changes)}. Choose another run.dir, or set them back")


def _resolved_path(value: Any) -> Any:
    """A file is the same however its path is written."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _by_number(folder: Path, kind: str) -> list[Path]:
    """A folder's kind_N.pt, the highest number first."""
    found = [path for path in folder.glob(f"{kind}_*.pt") if path.stem.removeprefix(f"{kind}_").isdigit()]
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _copy(content: Any) -> Any:
    """The same, with every tensor copied to the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content
