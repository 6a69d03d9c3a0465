"""A run's checkpoints, and how a run resumes from them.

checkpoints/step_N.pt    the newest `train.keep_checkpoints`
checkpoints/epoch_N.pt   every `train.keep_every_epochs`-th epoch's, and the last one's
checkpoints/last.pt      the newest
"""

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

FORMAT = 2  # of the training state in a checkpoint; it changes when the random draws or their order do

_KEEPING = ["checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "keep_every_epochs"]
# Settings that a resumed run may change, by section: they do not change what is computed.
RESUME_MAY_CHANGE = {
    "run": ["dir", "device", "seeds"],
    "model": [],
    # the pairs themselves are compared
    "data": ["shards", "val_shards", "root", "workers", "index_dir", "max_bad_fraction"],
    "features": ["dir", "batch_size", "part_size"],
    "train": ["micro_batch_size", "grad_checkpointing", "compile", "resume", "log_every_steps", *_KEEPING],
}

_STATE = {"step", "pairs", "fingerprint", "ranks", "optimizer", "scaler", "skipped", "skipped_steps"}


@contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Lock a run's folder against other processes. Raises ValueError when another one trains in it."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(run_dir) / ".lock", "a") as file:
        try:
            if fcntl:  # lockf, which workers do not inherit: they may outlive a killed run for a moment
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            place = f"run.dir={str(run_dir)!r}"
            raise ValueError(f"{place}: another process is training there; wait, or stop it") from error
        yield


class Checkpoints:
    """Rank 0 writes a run's checkpoints in the background, so that training waits only for a copy in memory.

    When the context ends, also after an error, every write has ended. Raises OSError when one has failed.
    """

    def __init__(self, run_dir: str | Path, train: TrainConfig) -> None:
        self.folder, self.train = checkpoint_folder(run_dir), train
        self.writer, self.current = ThreadPoolExecutor(1, "checkpoint"), Future()
        self.current.set_result(None)
        for partial in self.folder.glob("*.partial"):  # of a run that was killed while it wrote
            partial.unlink(missing_ok=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.writer.shutdown()
        if not error:
            self.wait()

    def write(self, content: dict[str, Any], step: int, epoch: int | None) -> None:
        """Copy the content, and write it after the previous checkpoint; epoch: to keep it as epoch_N.pt too."""
        self.wait()
        self.current = self.writer.submit(self._write, _copy(content), step, epoch)

    def check(self) -> None:
        """Raise OSError when a checkpoint could not be written."""
        if self.current.done():
            self.current.result()

    def wait(self) -> None:
        """Return when every checkpoint is on disk. Raises OSError when one could not be written."""
        self.current.result()

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
    """The checkpoint to resume from, or None for a new run.

    Raises FileNotFoundError for a missing train.resume; ValueError when none can be read or two runs would mix.
    """
    resume, folder = config.train.resume, checkpoint_folder(config.run.dir)
    if resume == "never" and any(folder.glob("*.pt")):
        raise ValueError(f"train.resume=never: {folder} holds a run already; choose another run.dir, or delete it")
    path, content = newest_checkpoint(folder)  # a run that has begun resumes from its own, not from train.resume
    names = gather_values(path and path.name)
    if len(set(names)) > 1:
        raise ValueError(f"run.dir: the ranks find {names} in {folder}; it must be a folder that all machines share")
    if not content and resume not in ("auto", "never"):
        path, content = Path(resume), read_checkpoint(resume)
    if not content:
        file, metrics = Path(config.run.dir) / "config.yaml", metrics_file(config.run.dir)
        if file.is_file() and metrics.is_file() and metrics.stat().st_size:  # a run that has no checkpoint yet
            _compare_settings(to_dict(load_config(file)), config, f"{file.parent} holds the beginning of a run")
        return None
    training = content.get("training") or {}
    if "config" not in content or not training.keys() >= _STATE:
        raise ValueError(f"{path}: holds weights but no state of a training run to resume; use it as model.pretrained")
    _compare_settings(content["config"], config, f"{path} is of a run")
    if training.get("format") != FORMAT and content["epoch"] < config.train.epochs:
        raise ValueError(
            f"{path}: of an unfinished run by a version of CLIPN with other random draws, which this version cannot "
            "resume; choose another run.dir, or finish it with that version"
        )
    log.info("resuming from %s", path)
    return content


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The newest readable checkpoint of a folder. Raises ValueError when it has checkpoints but none is readable."""
    paths = [*_by_number(folder, "step"), *folder.glob("last.pt"), *_by_number(folder, "epoch")]
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            log.warning("%s; trying an older one", error)
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints can be read; move them away to start again")
    return None, None


def _compare_settings(before: dict[str, Any], config: Config, place: str) -> None:
    defaults, now, changes = to_dict(Config()), to_dict(config), []
    for section, free in RESUME_MAY_CHANGE.items():
        then = defaults[section] | (before.get(section) or {})  # a setting newer than the run had its default
        changes += [
            f"{section}.{key}: {then[key]!r} -> {value!r}"
            for key, value in now[section].items()
            if key not in free and _resolved_path(then[key]) != _resolved_path(value)
        ]
    if changes:
        raise ValueError(f"{place} with other settings: {'; '.join(changes)}. Choose another run.dir, or set them back")


def _resolved_path(value: Any) -> Any:
    """The absolute path of a file, however it is written; any other value as it is."""
    return str(Path(value).resolve()) if isinstance(value, str) and Path(value).is_file() else value


def _by_number(folder: Path, kind: str) -> list[Path]:
    """A folder's kind_N.pt, the highest number first."""
    paths = [path for path in folder.glob(f"{kind}_*.pt") if path.stem.removeprefix(f"{kind}_").isdigit()]
    return sorted(paths, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _copy(content: Any) -> Any:
    """The same content, with every tensor copied to the CPU."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    return [_copy(value) for value in content] if isinstance(content, list) else content
