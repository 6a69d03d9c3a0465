"""Disturb a small training run as clusters do, and compare its result: python tests/drills/fault_drill.py [FAULT ...]

Faults: kill       kill -9 at random times, then the same command, until the run is done
        stop       SIGTERM at random times, in the same way
        full-disk  no room for a checkpoint
        truncated  the newest checkpoint is cut short
        extract    kill -9 while features are computed
        rank       kill -9 of one of two ranks
        stop-ranks SIGTERM to two ranks

Each row of the table says what happened, and whether the final weights are, bit for bit, those of an undisturbed run on
as many ranks.
"""

import argparse
import functools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from clipn.model.checkpoint import last_checkpoint, read_checkpoint  # noqa: E402
from clipn.runtime.console import FAILED  # noqa: E402
from clipn.runtime.signals import RESUME  # noqa: E402
from clipn.toy.generate import World, make_toy  # noqa: E402
from clipn.training.run_folder import newest_checkpoint  # noqa: E402

EVERY = 10  # steps between checkpoints
SETTINGS = ["base={}", "eval.id=null", "model.pretrained=null", "train.epochs=2", "train.batch_size=32"]
SETTINGS += ["train.log_every_steps=1", f"train.checkpoint_every_steps={EVERY}", "features.part_size=256"]
SETTINGS += ["world.images_per_class=1", "data.workers=0"]
# Steps. A checkpoint waits for the one before, so a kill during a write loses the steps since that one.
MAX_LOST = {signal.SIGKILL: 2 * EVERY, signal.SIGTERM: 0}
Result = tuple[str, bool]  # what happened, and whether nothing was lost


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module. Returns the number of faults after which a run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", default=[*FAULTS], help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=20, help="number of signals of kill, stop and extract")
    parser.add_argument("--pairs", type=int, default=4000, help="pairs that the run trains on")
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.faults) - set(FAULTS)
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; choose from: {', '.join(FAULTS)}")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder), arguments.times, arguments.pairs, random.Random(arguments.seed))
        print("| fault | what happened | final weights |\n| --- | --- | --- |", flush=True)
        for name in arguments.faults:
            text, same = FAULTS[name](drill)
            failures += not same
            print(f"| {name} | {text} | {'the same bits' if same else 'DIFFERENT'} |", flush=True)
    print(f"done: {failures} failures")
    return failures


class Drill:
    """A folder with a small world, and disturbed runs on it."""

    def __init__(self, folder: Path, times: int, pairs: int, times_of_signals: random.Random) -> None:
        self.folder, self.times, self.random = folder, times, times_of_signals
        self.settings = [*SETTINGS, f"world.root={folder}/world", f"world.num_pairs={pairs}"]
        make_toy(folder / "world", World(pairs, images_per_class=1))

    def start(self, run: str, *words: str, ranks: int = 1, file_size: int | None = None) -> subprocess.Popen:
        """Start or resume a run; file_size: the bytes after which writing a file fails."""

        def limit() -> None:
            if file_size:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        command = [sys.executable, "-m", "clipn", "train", "toy", f"run.dir={self.folder / run}"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"NPROC": str(ranks)}
        command += [*self.settings, *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=limit, **output)

    def finish(self, run: str, *words: str, ranks: int = 1) -> None:
        """Run the same command undisturbed to its end."""
        process = self.start(run, *words, ranks=ranks)
        output = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode} without a fault: {output[-2000:]}")

    @functools.cache  # noqa: B019
    def expected(self, *words: str, ranks: int = 1) -> tuple[dict, float]:
        """The weights of such a run when undisturbed, and its seconds."""
        run, began = f"undisturbed_{ranks}{'_features' if words else ''}", time.monotonic()
        self.finish(run, *words, ranks=ranks)
        return self.weights(run), time.monotonic() - began

    def weights(self, run: str) -> dict:
        return read_checkpoint(last_checkpoint(self.folder / run))["state_dict"]

    def same(self, run: str, *words: str, ranks: int = 1) -> bool:
        """Whether a run ended as the undisturbed one."""
        here, there = self.weights(run), self.expected(*words, ranks=ranks)[0]
        return all(torch.equal(here[name], there[name]) for name in there)

    def step(self, run: str) -> int:
        """The step of the newest checkpoint."""
        content = newest_checkpoint(self.folder / run / "checkpoints")[1]
        return content["training"]["step"] if content else 0

    def steps_logged(self, run: str) -> int:
        file = self.folder / run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def start_until(self, run: str, steps: int, ranks: int = 1) -> subprocess.Popen:
        """Start a run, and return once it has logged some steps."""
        process = self.start(run, ranks=ranks)
        while self.steps_logged(run) < steps:
            time.sleep(0.02)
        return process

    def kill_at(self, run: str, steps: int) -> int:
        """Kill a run once it has logged some steps; returns the step of its newest checkpoint."""
        process = self.start_until(run, steps)
        process.kill()
        process.communicate()
        return self.step(run)


def strike(drill: Drill, name: str, number: int, *words: str) -> Result:
    """Send a signal at random times of a run until it is done, then of another run, `drill.times` times."""
    seconds, lost, codes, runs, same = drill.expected(*words)[1], [], set(), 0, True
    while len(lost) < drill.times:
        run = f"{name}_{runs}"
        while True:
            process = drill.start(run, *words)
            try:
                process.communicate(timeout=drill.random.uniform(0.1, 0.9) * seconds)
                break  # the run is done
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            process.communicate()
            codes.add(process.returncode)
            lost.append(drill.steps_logged(run) - drill.step(run))
        runs, same = runs + 1, same and process.returncode == 0 and drill.same(run, *words)
    text = f"{len(lost)} times in {runs} runs, codes {sorted(codes)}; {min(lost)} to {max(lost)} steps lost each time"
    return text, same and max(lost) <= MAX_LOST[number]


def full_disk(drill: Drill) -> Result:
    before = drill.kill_at("full", 3 * EVERY)
    process = drill.start("full", file_size=last_checkpoint(drill.folder / "full").stat().st_size // 2)
    message = process.communicate()[0].splitlines()[-1].replace(str(drill.folder), "")
    kept = drill.step("full") == before and process.returncode == FAILED
    drill.finish("full")
    text = f"exit code {process.returncode}: {message}; the checkpoint of step {before} stayed"
    return text, kept and drill.same("full")


def truncated(drill: Drill) -> Result:
    before = drill.kill_at("truncated", 4 * EVERY)
    newest = newest_checkpoint(drill.folder / "truncated" / "checkpoints")[0]
    os.truncate(newest, newest.stat().st_size // 2)  # last.pt is the same file
    after = drill.step("truncated")
    drill.finish("truncated")
    text = f"{newest.name} was cut short: the run resumed from step {after} instead of {before}"
    return text, 0 < after < before and drill.same("truncated")


def two_ranks(drill: Drill, name: str, number: int, code: int) -> Result:
    """Kill one of two ranks, or ask the command that started them to stop."""
    process = drill.start_until(name, 3 * EVERY, ranks=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if number == signal.SIGKILL else process.pid, number)
    began = time.monotonic()
    output = process.communicate()[0]
    seconds, lost = time.monotonic() - began, drill.steps_logged(name) - drill.step(name)
    message = [line for line in output.splitlines() if line.startswith("error: rank")][-1:]
    drill.finish(name, ranks=2)
    text = f"exit code {process.returncode} after {seconds:.0f} s, {lost} steps lost: {message}"
    return text, process.returncode == code and lost <= MAX_LOST[number] and drill.same(name, ranks=2)


FAULTS: dict[str, Callable[[Drill], Result]] = {
    "kill": lambda drill: strike(drill, "killed", signal.SIGKILL),
    "stop": lambda drill: strike(drill, "stopped", signal.SIGTERM),
    "full-disk": full_disk,
    "truncated": truncated,
    "extract": lambda drill: strike(drill, "extracted", signal.SIGKILL, "data.source=features"),
    "rank": lambda drill: two_ranks(drill, "rank", signal.SIGKILL, FAILED),
    "stop-ranks": lambda drill: two_ranks(drill, "stop-ranks", signal.SIGTERM, RESUME),
}


if __name__ == "__main__":
    sys.exit(main())
