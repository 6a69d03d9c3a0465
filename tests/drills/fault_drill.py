"""Hurt a small training run as clusters do, and see what is lost: python scripts/fault_drill.py [FAULT ...]

Faults: kill       kill -9 at random moments, then the same command, again and again until the run is done
        stop       SIGTERM at random moments, the same way
        full-disk  no room for a checkpoint
        broken     the newest checkpoint is cut short
        extract    kill -9 while features are computed
        rank       one of two ranks is killed with -9
        stop-ranks SIGTERM to two ranks under torchrun

Each row of the table says what happened, and whether the weights in the end are, bit for bit, those of a run that
nothing happened to. (A run on two ranks is compared with one on two ranks.)
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clipn.model.checkpoint import last_checkpoint, read_checkpoint
from clipn.runtime.console import FAILED
from clipn.runtime.signals import RESUME
from clipn.toy.generate import make_toy
from clipn.training.run_folder import newest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EVERY = 10  # steps between checkpoints
SETTINGS = [
    "base={}",
    "eval.id=null",
    "model.pretrained=null",
    "train.epochs=2",
    "train.batch_size=32",
    "train.log_every_steps=1",
    f"train.checkpoint_every_steps={EVERY}",
    "features.part_size=256",
    "world.images_per_class=1",
    "data.workers=0",
]


def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's text. Returns how many faults did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=20, help="how often kill, stop and extract strike")
    parser.add_argument("--pairs", type=int, default=4000, help="pairs that the run trains on")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.faults) - set(FAULTS)
    if unknown:
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are: {', '.join(FAULTS)}")
    harm = 0
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder), arguments.times, arguments.pairs, random.Random(arguments.seed))
        print("| fault | what happened | weights in the end |\n| --- | --- | --- |", flush=True)
        for name in arguments.faults or FAULTS:
            told, same = FAULTS[name](drill)
            harm += not same
            print(f"| {name} | {told} | {'the same bits' if same else 'OTHERS'} |", flush=True)
    print(f"done: {harm} faults did harm")
    return harm


class Drill:
    """A folder with a small world, and runs on it that are hurt."""

    def __init__(self, folder: Path, times: int, pairs: int, moments: random.Random) -> None:
        self.folder, self.times, self.moments = folder, times, moments
        self.settings = [*SETTINGS, f"world.root={folder}/world", f"world.num_pairs={pairs}"]
        make_toy(folder / "world", pairs, images_per_class=1, seed=0, image_size=32)
        self.unhurt: dict[str, tuple[dict, float]] = {}  # by kind of run: its weights, and its seconds

    def command(self, run: str, *more: str, ranks: int = 1) -> list[str]:
        script = ["scripts/train.py", "configs/toy.yaml", f"run.dir={self.folder / run}", *self.settings, *more]
        launch = ["scripts/launch.py", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return [sys.executable, *launch, *script]

    def start(self, command: list[str], file_size: int | None = None) -> subprocess.Popen:
        """Start it in a process group of its own; file_size: the bytes after which writing a file fails."""

        def limit() -> None:
            if file_size:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit
        )

    def finish(self, command: list[str]) -> None:
        """The same command, unhurt, to its end."""
        process = self.start(command)
        output = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode} where nothing was hurt: {output[-2000:]}")

    def expected(self, *more: str, ranks: int = 1) -> tuple[dict, float]:
        """The weights of such a run that nothing happens to, and its seconds."""
        key = f"unhurt_{ranks}{'_features' if more else ''}"
        if key not in self.unhurt:
            began = time.monotonic()
            self.finish(self.command(key, *more, ranks=ranks))
            self.unhurt[key] = self.weights(key), time.monotonic() - began
        return self.unhurt[key]

    def weights(self, run: str) -> dict:
        return read_checkpoint(last_checkpoint(self.folder / run))["state_dict"]

    def same(self, run: str, *more: str, ranks: int = 1) -> bool:
        """Whether a run ended as one that nothing happened to."""
        here, there = self.weights(run), self.expected(*more, ranks=ranks)[0]
        return all(torch.equal(here[name], there[name]) for name in there)

    def step(self, run: str) -> int:
        """The step of the newest checkpoint; reading it fails if it is not whole."""
        content = newest_checkpoint(self.folder / run / "checkpoints")[1]
        return content["training"]["step"] if content else 0

    def lines(self, run: str) -> int:
        """How many steps the run says it has taken."""
        file = self.folder / run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def kill_at(self, run: str, steps: int) -> int:
        """Start a run, kill it once it has taken some steps; returns the step of its newest checkpoint."""
        process = self.start(self.command(run))
        self.wait_for_steps(run, steps)
        process.kill()
        process.communicate()
        return self.step(run)

    def wait_for_steps(self, run: str, steps: int) -> None:
        while self.lines(run) < steps:
            time.sleep(0.02)


def strike(drill: Drill, name: str, number: int, *more: str) -> tuple[str, bool]:
    """A signal at random moments of a run's life, again and again until it is done; then another run's."""
    seconds, lost, codes, runs, same = drill.expected(*more)[1], [], set(), 0, True
    while len(lost) < drill.times:
        run = f"{name}_{runs}"
        while True:
            process = drill.start(drill.command(run, *more))
            try:
                process.communicate(timeout=drill.moments.uniform(0.1, 0.9) * seconds)
                break  # it got to its end
            except subprocess.TimeoutExpired:
                process.send_signal(number)
            process.communicate()
            codes.add(process.returncode)
            lost.append(drill.lines(run) - drill.step(run))
        runs, same = runs + 1, same and process.returncode == 0 and drill.same(run, *more)
    told = f"{len(lost)} times in {runs} runs, codes {sorted(codes)}; {min(lost)} to {max(lost)} steps lost each time"
    # The next checkpoint waits for the one before; killed while one is written, a run loses the steps since that.
    assert max(lost) <= (2 * EVERY if number == signal.SIGKILL else 0), told
    return told, same


def kill(drill: Drill) -> tuple[str, bool]:
    return strike(drill, "killed", signal.SIGKILL)


def stop(drill: Drill) -> tuple[str, bool]:
    return strike(drill, "stopped", signal.SIGTERM)


def extract(drill: Drill) -> tuple[str, bool]:
    return strike(drill, "extracted", signal.SIGKILL, "data.source=features")


def full_disk(drill: Drill) -> tuple[str, bool]:
    command, before = drill.command("full"), drill.kill_at("full", 3 * EVERY)
    size = last_checkpoint(drill.folder / "full").stat().st_size
    process = drill.start(command, file_size=size // 2)
    message = process.communicate()[0].splitlines()[-1].replace(str(drill.folder), "")
    kept = drill.step("full") == before and process.returncode == FAILED
    drill.finish(command)
    return f"exit code {process.returncode}: {message}; the checkpoint of step {before} stayed", (
        kept and drill.same("full")
    )


def broken(drill: Drill) -> tuple[str, bool]:
    before = drill.kill_at("broken", 4 * EVERY)
    newest = newest_checkpoint(drill.folder / "broken" / "checkpoints")[0]
    os.truncate(newest, newest.stat().st_size // 2)  # last.pt is the same file
    after = drill.step("broken")
    drill.finish(drill.command("broken"))
    told = f"{newest.name} was cut short: it went on from step {after} instead of {before}"
    return told, 0 < after < before and drill.same("broken")


def rank(drill: Drill) -> tuple[str, bool]:
    command = drill.command("rank", ranks=2)
    process = drill.start(command)
    drill.wait_for_steps("rank", 3 * EVERY)
    os.kill(_children(process.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    output = process.communicate()[0]
    seconds, lost = time.monotonic() - began, drill.lines("rank") - drill.step("rank")
    said = [line for line in output.splitlines() if line.startswith("error: rank")]
    drill.finish(command)
    told = f"exit code {process.returncode} after {seconds:.0f} s, {lost} steps lost: {said[-1] if said else '?'}"
    return told, process.returncode == FAILED and lost <= 2 * EVERY and drill.same("rank", ranks=2)


def stop_ranks(drill: Drill) -> tuple[str, bool]:
    command = drill.command("stop-ranks", ranks=2)
    process = drill.start(command)
    drill.wait_for_steps("stop-ranks", 3 * EVERY)
    process.terminate()
    process.communicate()
    lost = drill.lines("stop-ranks") - drill.step("stop-ranks")
    drill.finish(command)
    told = f"exit code {process.returncode}, {lost} steps lost"
    return told, process.returncode == RESUME and lost == 0 and drill.same("stop-ranks", ranks=2)


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


FAULTS: dict[str, Callable[[Drill], tuple[str, bool]]] = {
    "kill": kill,
    "stop": stop,
    "full-disk": full_disk,
    "broken": broken,
    "extract": extract,
    "rank": rank,
    "stop-ranks": stop_ranks,
}


if __name__ == "__main__":
    sys.exit(main())
