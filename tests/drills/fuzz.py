"""Feed broken files to the readers of shards, tables and configs: python scripts/fuzz.py [shards|tables|config ...]

    python scripts/fuzz.py --minutes 10                each of the three for ten minutes
    python scripts/fuzz.py shards --seed 3 --case 41   one case again

A case is a few files, drawn from (target, seed, case number) alone. It must end in --limit seconds: well, or with a
ValueError or OSError whose one line names the file or the key. A shard's pairs must be its members, a bad pair must be
replaced by a good one and counted, and each line of the log be one line. Any other end is a finding: each kind is told
once, the files of its first case are kept, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.fuzz_cases import config_files, shard_files, table_files

import clipn.data.shards
from clipn.config.loading import load_config
from clipn.config.schema import DataConfig
from clipn.data.images import default_preprocess, train_transform
from clipn.data.pairs import PairDataset, Pairs, open_pairs
from clipn.data.shards import CAUSES, BadPair, ShardPairs
from clipn.model.base import get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LARGEST_MEMBER = 10**7  # bytes that a tar's own reader is asked for: a sparse member may claim any size


class Wrong(Exception):
    """What was read is not what is in the files."""


class TooLong(BaseException):
    """Not an Exception, which the readers may catch."""


class End(NamedTuple):
    """How a case ended: the kind of end, and what is wrong with it, if anything is."""

    kind: str
    detail: str = ""


class InlinePool:
    """In place of ProcessPoolExecutor: an alarm does not reach another process, and starting one outlasts a case."""

    def __init__(self, workers: int) -> None:
        self.map = map

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class LogLines(logging.Handler):
    """Keeps the package's messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        line.encode()  # as a log file would: its error is then the case's
        self.lines.append(line)


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; none: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--limit", type=int, default=20, help="seconds for a case")
    parser.add_argument(
        "--keep", type=Path, help="folder for the files of findings; default: a new temporary one, named at the end"
    )
    arguments = parser.parse_args(argv)
    for target in arguments.targets:
        if target not in TARGETS:
            parser.error(f"{target}: expected {', '.join(TARGETS)}")
    keep = arguments.keep or Path(tempfile.gettempdir()) / f"clipn-fuzz-{os.getpid()}"
    torch.set_num_threads(1)
    with quiet() as log:
        kinds = [fuzz(target, arguments, keep, log) for target in arguments.targets or TARGETS]
    if any(kinds):
        print(f"{sum(kinds)} kinds of findings; their first cases are in {keep}")
        sys.exit(1)


def fuzz(target: str, arguments: argparse.Namespace, keep: Path, log: LogLines) -> int:
    """Cases of one target until the time is over. Returns how many kinds of findings there are."""
    begin, ends, kinds = time.monotonic(), Counter(), Counter()
    cases = count() if arguments.case is None else [arguments.case]
    for case in tqdm(cases, desc=target, unit="case", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            end = run_case(target, arguments.seed, case, Path(folder), arguments.limit, log)
            ends["finding" if end.detail else end.kind] += 1
            kinds[end.kind] += bool(end.detail)
            if end.detail and kinds[end.kind] == 1:
                shutil.copytree(folder, keep / f"{target}-{arguments.seed}-{case}", dirs_exist_ok=True)
                tqdm.write(f"{target} --seed {arguments.seed} --case {case}: {end.kind}: {end.detail}")
        if time.monotonic() - begin > 60 * arguments.minutes:
            break
    told = ", ".join(f"{number} {end}" for end, number in ends.most_common())
    print(f"{target}, seed {arguments.seed}: {ends.total()} cases in {(time.monotonic() - begin) / 60:.1f} min: {told}")
    return len(+kinds)


def run_case(target: str, seed: int, case: int, folder: Path, limit: int, log: LogLines) -> End:
    """Write a case's files and read them."""
    make, read = TARGETS[target]
    for name, content in make(random.Random(f"{target} {seed} {case}")).items():
        (folder / name).write_bytes(content)
    log.lines.clear()
    signal.alarm(limit)
    try:
        read(folder)
        end = End("well")
    except (Exception, TooLong) as error:
        end = judge(error, folder)
    finally:
        signal.alarm(0)
    broken = [line for line in log.lines if not is_one_line(line)]
    return End("log", f"{broken[0]!r:.300}") if broken and not end.detail else end


def judge(error: BaseException, folder: Path) -> End:
    """Whether an error tells a user what is wrong, and where."""
    message, kind = str(error), type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent == ROOT / "clipn"] or frames
    place = f"{kind} in {Path(own[-1].filename).name}:{own[-1].lineno}"
    if not isinstance(error, (ValueError, OSError)):
        return End(place, f"{message or kind:.300}")
    if not is_one_line(message):
        return End(place, f"not one line: {message!r:.300}")
    if not any(name in message for name in (str(folder), "data.", "command line")):
        return End(place, f"names no file or key: {message!r:.300}")
    return End(kind)


def is_one_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and "Traceback" not in text


def read_config(folder: Path) -> None:
    load_config(folder / "x.yaml", json.loads((folder / "case.json").read_text())["words"])


def read_pairs(folder: Path) -> None:
    """Every pair once, as training reads it. Raises Wrong, and what opening and reading raise."""
    data = json.loads((folder / "case.json").read_text())
    shards = data.pop("shards")
    paths = str(folder / shards) if isinstance(shards, str) else [str(folder / shard) for shard in shards]
    pairs = open_pairs(DataConfig(shards=paths, index_dir=str(folder / "index"), workers=0, **data))
    if isinstance(pairs, ShardPairs):
        check_members(pairs)
    check_epoch(pairs)


def check_members(pairs: ShardPairs) -> None:
    """Images and captions are whole members of their shard, as tarfile itself reads them."""
    contents = [set(members(path)) for path in pairs.paths]
    for number, shard in enumerate(pairs.index.shard):
        try:
            pair = pairs[number]
        except BadPair:
            continue
        if pair.image not in contents[shard]:
            raise Wrong("an image that is no member")
        if not pairs.index.text_is_json[number] and pair.caption.encode() not in contents[shard]:
            raise Wrong("a caption that is no member")


def members(path: Path) -> Iterator[bytes]:
    """What a tar holds, as far as it can be read."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if archive.offset < member.offset_data:  # a negative size: without end in older Pythons
                    return
                if member.isreg() and member.size < LARGEST_MEMBER:
                    yield archive.extractfile(member).read()
    except Exception:  # of any kind: that the readers tell it in theirs is what is tested
        return


def check_epoch(pairs: Pairs) -> None:
    """A good pair is given as it is; in place of a bad one another that is good, and the bad one's cause is counted."""
    dataset = PairDataset(pairs, train_transform(default_preprocess(16)), tokenizer())
    alone = [read_alone(dataset, number) for number in range(len(pairs))]
    bad = {cause for cause in alone if isinstance(cause, str)}
    for number, own in enumerate(alone):
        try:
            sample = dataset[(0, number)]
        except ValueError as error:
            if isinstance(own, str):
                raise
            raise Wrong(f"pair {number} is good, but: {error}") from error
        taken, counted = sample["number"], {CAUSES[place] for place in sample["skipped"].nonzero()}
        if isinstance(alone[taken], str) or not torch.equal(sample["tokens"], alone[taken]["tokens"]):
            raise Wrong(f"pair {number}: {taken} is given with other words")
        if isinstance(own, str) and not {own} <= counted <= bad:
            raise Wrong(f"pair {number}: {own} is counted as {counted}")
        if isinstance(own, dict) and (taken != number or counted or not torch.equal(sample["image"], own["image"])):
            raise Wrong(f"pair {number} is good, but {taken} is given, after {counted}")


def read_alone(dataset: PairDataset, number: int) -> dict[str, torch.Tensor] | str:
    """The pair's sample, or what is wrong with it."""
    try:
        return dataset.views(number, [0])[0]
    except BadPair as error:
        return error.cause


@cache
def tokenizer() -> Callable[[list[str]], torch.Tensor]:
    return get_tokenizer(str(ROOT / "configs" / "toy_model.json"))


@contextmanager
def quiet() -> Iterator[LogLines]:
    """One process, with alarms, whose messages are kept and not shown."""
    log, logger = LogLines(), logging.getLogger("clipn")
    logger.addHandler(log)
    logger.propagate = False
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    clipn.data.shards.ProcessPoolExecutor = InlinePool
    clipn.data.shards.tqdm = lambda **options: tqdm(**options | {"disable": True})
    signal.signal(signal.SIGALRM, stop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield log
    logger.removeHandler(log)


def stop(number: int, frame: object) -> None:
    raise TooLong("no end in time")


TARGETS = {
    "shards": (shard_files, read_pairs),
    "tables": (table_files, read_pairs),
    "config": (config_files, read_config),
}

if __name__ == "__main__":
    main()
