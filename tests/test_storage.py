"""Files on this machine and behind URLs."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
from helpers import default_preprocess, messages, numbered_samples, spell, write_shard, write_tar

import clipn.data.storage
from clipn.config.schema import Config, DataConfig
from clipn.data.pairs import Pairs, open_pairs, training_loader
from clipn.data.shards import CAUSES, BadPair
from clipn.data.storage import expand_patterns, read_range, version_of
from clipn.runtime import signals

# Patterns


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("train-{008..010}.tar", "train-008.tar train-009.tar train-010.tar"),
        ("{val,train}-010.tar", "val-010.tar train-010.tar"),
        ("{train,val}-{009..010}.tar", "train-009.tar train-010.tar val-009.tar val-010.tar"),
        ("train-*.tar", "train-008.tar train-009.tar train-010.tar"),
        ("{val,train}-0?0.tar", "val-010.tar train-010.tar"),
        ("val-010.tar", "val-010.tar"),
        (["val-010.tar", "train-{010..009}.tar"], "val-010.tar train-010.tar train-009.tar"),
        ("s[1]{a,b}*}.tar", "s[1]{a,b}*}.tar"),
    ],
)
def test_patterns_expand_in_order(tmp_path, monkeypatch, pattern, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("train-008.tar", "train-009.tar", "train-010.tar", "val-009.tar", "val-010.tar", "s[1]{a,b}*}.tar"):
        Path(name).touch()
    assert " ".join(map(str, expand_patterns(pattern))) == expected


def test_a_pattern_without_a_file_is_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"data\.shards=.*\{0\.\.2\}.*1\.tar$"):
        expand_patterns(str(tmp_path / "{0..2}.tar"))
    for nothing in (str(tmp_path / "x*.tar"), str(tmp_path), "", []):
        with pytest.raises(FileNotFoundError, match=r"data\.shards"):
            expand_patterns(nothing)
    with pytest.raises(ValueError, match=r"data\.shards='\{0\.tar': Unbalanced braces"):
        expand_patterns("{0.tar")


@pytest.fixture
def shards(server, tmp_path) -> list[Path]:
    """0.tar with six pairs and 1.tar with one, served too."""
    paths = [write_shard(tmp_path / f"{n}.tar", numbered_samples(6 - 5 * n, 6 * n)) for n in range(2)]
    server.files |= {path.name: path.read_bytes() for path in paths}
    return paths


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses between attempts, which then take no time."""
    seconds = []
    monkeypatch.setattr("clipn.data.storage.time.sleep", seconds.append)
    return seconds


def contents(data: DataConfig) -> list[tuple[bytes, str]]:
    pairs = open_pairs(data)
    return [tuple(pairs[n]) for n in range(len(pairs))]


def batches(data: DataConfig, pairs: Pairs) -> Iterator[dict]:
    """Training batches, each of all pairs."""
    config = Config()
    config.data, config.run.device, config.train.batch_size = data, "cpu", len(pairs)
    return iter(training_loader(config, pairs, default_preprocess(16), spell)[0])


# Shards behind URLs


def test_shards_behind_urls_hold_the_pairs_of_the_local_files(server, shards, settings):
    expected = contents(settings(shards))
    assert len(expected) == 7
    assert contents(settings(server.url("{0..1}.tar"))) == expected
    assert contents(settings([server.url("0.tar"), str(shards[1])])) == expected, "local files and URLs may be mixed"
    assert contents(settings(server.url("{0..1}.tar?key=a"))) == expected


def test_neighbours_are_read_by_one_request(server, shards, settings):
    expected, pairs = contents(settings(shards)), open_pairs(settings(server.url("{0..1}.tar")))
    cases = ([3], 1), (range(7), 2), ([0, 1, 4, 5], 1), ([5, 4, 6], 3), ([2, 2], 2), ([6, 1], 2), ([], 0)
    for numbers, requests in cases:
        server.requests.clear()
        assert [tuple(pair) for pair in pairs.read(numbers)] == [expected[n] for n in numbers]
        assert sum("bytes=" in request for request in server.requests) == requests, numbers


def test_files_far_apart_are_read_alone(server, settings, tmp_path):
    """A shard with all images before all captions, and one with a large file of another kind between pairs."""
    made = numbered_samples(3)
    images, captions = ({f"{key}.{kind}": made[key][kind] for key in made} for kind in ("jpg", "txt"))
    large = {"00000.npy": bytes(10**5), "00001.npy": bytes(10**5)}
    write_tar(tmp_path / "a.tar", images | large | captions)
    write_shard(tmp_path / "b.tar", {key: files | {"npy": bytes(10**5)} for key, files in made.items()})
    expected = contents(settings(write_shard(tmp_path / "c.tar", made)))
    for name, requests in (("a.tar", 6), ("b.tar", 3)):
        server.files[name] = (tmp_path / name).read_bytes()
        pairs = open_pairs(settings(server.url(name)))
        server.requests.clear()
        assert [tuple(pair) for pair in pairs.read(range(3))] == expected
        reads = [re.search(r"bytes=(\d+)-(\d+)", request) for request in server.requests]
        spans = [int(read[2]) - int(read[1]) for read in reads if read]
        assert len(spans) == requests and max(spans) < 10**5


def test_a_glob_matches_what_the_server_lists(server, shards):
    server.files[""] = b'<a href="0.tar">0</a> <a href="1.tar">1</a> <a href="notes.md">notes</a>'
    server.headers["Content-Type"] = "text/html"
    urls = [server.url("0.tar"), server.url("1.tar")]
    assert expand_patterns(server.url("*.tar")) == urls


def test_workers_read_urls_too(server, shards, settings):
    data = settings(server.url("{0..1}.tar"), workers=2)
    batch = next(batches(data, open_pairs(data)))
    assert sorted(batch["number"].tolist()) == list(range(7)) and not batch["skipped"].any()


def test_a_shard_is_read_block_by_block(server, shards, settings, monkeypatch):
    expected = contents(settings(shards))
    monkeypatch.setattr(clipn.data.storage, "BLOCK", 1000)
    monkeypatch.setattr(clipn.data.storage, "TIMEOUT", 0.5)
    server.faults = {"0.tar": repeat(0.03)}
    assert contents(settings(server.url("{0..1}.tar"))) == expected
    reads = sum("0.tar bytes=" in request for request in server.requests)
    assert 0.03 * reads > 0.5, "the limit is for each read, not for all of a shard"


@pytest.mark.parametrize("key", ["ETag", "Last-Modified"])
def test_the_index_of_a_url_is_cached_until_the_file_changes(server, shards, settings, key):
    data, scan = settings(server.url("0.tar")), f"GET 0.tar bytes=0-{shards[0].stat().st_size - 1}"
    for version, scans in (("1", 1), ("1", 1), ("2", 2)):
        server.headers = {key: version}
        assert len(open_pairs(data)) == 6 and server.requests.count(scan) == scans
    server.files["0.tar"] = write_shard(shards[0], numbered_samples(30)).read_bytes()
    assert len(open_pairs(data)) == 30, "only the size differs"


def test_a_missing_url_is_reported_before_anything_is_read(server, shards, settings, pauses):
    with pytest.raises(FileNotFoundError, match=re.escape(server.url("gone.tar"))):
        open_pairs(settings(server.url("{0,1,gone}.tar")))
    assert not pauses and not any("bytes=" in request for request in server.requests)


def test_an_unknown_protocol_is_reported(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    for url in ("s3://bucket/{0..1}.tar", "s3://bucket/*.tar", "nosuch://x/y.tar"):
        with pytest.raises(ValueError, match=r"data\.shards=.*: .*(Install s3fs|Protocol not known: nosuch)"):
            open_pairs(settings(url))


# Reads that fail


def test_a_failed_or_stalled_read_is_retried_with_growing_pauses(server, shards, pauses, monkeypatch):
    monkeypatch.setattr(clipn.data.storage, "TIMEOUT", 0.5)
    server.faults["0.tar"] = iter(["503", "cut", 60.0])
    assert read_range(server.url("0.tar"), 5, 20) == shards[0].read_bytes()[5:25]
    assert pauses == [0.5, 1, 2] and len(server.requests) == 4
    for fault, reason in {"503": "Service Unavailable", "cut": "Payload"}.items():
        server.faults["0.tar"] = repeat(fault)
        with pytest.raises(OSError, match=rf"0\.tar: not readable in 4 attempts: .*{reason}"):
            read_range(server.url("0.tar"), 0, 20)
    assert len(pauses) == 9 and len(server.requests) == 12


def test_a_server_error_is_not_a_missing_file(server, shards, settings, pauses):
    server.faults["0.tar"] = iter(["503"] * 4)  # a HEAD and a GET in each attempt
    assert version_of(server.url("0.tar")) == (shards[0].stat().st_size, '"1"')
    assert pauses == [0.5, 1]
    server.faults["0.tar"] = repeat("503")
    with pytest.raises(OSError, match=r"0\.tar: not readable in 4 attempts: .*Service Unavailable"):
        open_pairs(settings(server.url("0.tar")))
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="not readable in 4 attempts: ClientConnectorError"):
        version_of(server.url("0.tar"))


@pytest.mark.parametrize("fault", ["503", "cut", 20.0])
def test_a_pair_that_stays_unreadable_is_replaced_and_counted(server, shards, settings, monkeypatch, caplog, fault):
    data = settings(server.url("{0..1}.tar"))
    pairs = open_pairs(data)
    server.faults["1.tar"] = repeat(fault)
    monkeypatch.setattr(clipn.data.storage, "TIMEOUT", 0.3)
    monkeypatch.setattr(clipn.data.storage, "FIRST_PAUSE", 0.01)
    batch = next(batches(data, pairs))
    assert len(batch["number"]) == 7 and set(batch["number"].tolist()) == set(range(6))
    assert batch["skipped"].sum() == batch["skipped"].sum(dim=0)[CAUSES.index("unreadable file")] > 0
    assert re.search(r"skipped .*1\.tar, byte 512: unreadable file: .*not readable in 4 attempts", messages(caplog))


def test_a_file_that_ends_too_early_is_reported(server, shards):
    for path in (shards[0], server.url("0.tar")):
        with pytest.raises(OSError, match=r"0\.tar: ends 10 bytes too early"):
            read_range(path, shards[0].stat().st_size - 10, 20)


def test_a_server_without_byte_ranges_or_sizes_is_reported(server, shards, settings, monkeypatch):
    server.ranges, url = False, server.url("0.tar")
    monkeypatch.setattr(clipn.data.storage, "BLOCK", 1000)
    for read in (lambda: read_range(url, 512, 20), lambda: open_pairs(settings(url))):
        with pytest.raises(OSError, match=rf"{re.escape(url)}: the server ignores byte ranges"):
            read()
    server.headers = {"Content-Length": ""}
    with pytest.raises(OSError, match=r"0\.tar: the server does not say how large it is"):
        open_pairs(settings(url))


def test_a_missing_local_file_is_an_unreadable_pair(shards, settings, pauses):
    pairs = open_pairs(settings(shards))
    shards[1].unlink()
    with pytest.raises(BadPair, match=r"unreadable file: .*1\.tar"):
        pairs[6]
    assert pairs[5].caption == "caption 5" and not pauses


def test_only_the_pairs_beyond_a_break_are_unreadable_when_neighbours_are_read(shards, settings, pauses):
    pairs = open_pairs(settings(shards))
    os.truncate(shards[0], pairs.index.text_start[3])
    read = list(pairs.read(range(7)))
    assert [isinstance(pair, BadPair) for pair in read] == [False] * 3 + [True] * 3 + [False]
    assert {pair.cause for pair in read[3:6]} == {"unreadable file"}
    assert [pair.caption for pair in read if not isinstance(pair, BadPair)] == [f"caption {n}" for n in (0, 1, 2, 6)]


def test_a_local_disk_is_retried_too(shards, settings, monkeypatch, pauses):
    pairs, failures = open_pairs(settings(shards)), iter([OSError("disk"), TimeoutError("disk")])

    def flaky(*args):
        if failure := next(failures, None):
            raise failure
        return open(*args)

    monkeypatch.setattr(clipn.data.storage, "open", flaky, raising=False)
    assert pairs[3].caption == "caption 3" and pauses == [0.5, 1]
    failures = repeat(OSError("disk"))
    with pytest.raises(BadPair, match=r"unreadable file: .*0\.tar: not readable in 4 attempts: OSError disk"):
        pairs[3]


# Stop requests


@pytest.fixture
def stop_when_stalled(server, monkeypatch):
    """Stalls the reads of 1.tar for good, and sends this process SIGTERM when one stalls."""
    monkeypatch.setattr(clipn.data.storage, "TIMEOUT", 1e6)
    monkeypatch.setattr(signals, "_asked", [])

    def stop() -> None:
        if server.stalled.wait(60):
            os.kill(os.getpid(), signal.SIGTERM)

    def start(whole_requests: int) -> None:
        server.faults["1.tar"] = chain(repeat(None, whole_requests), repeat(1e6))
        threading.Thread(target=stop, daemon=True).start()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_request_ends_batches_whose_reads_stall(server, shards, settings, stop_when_stalled, workers):
    data = settings(server.url("{0..1}.tar"), workers=workers)
    pairs = open_pairs(data)
    stop_when_stalled(0)
    with signals.StopSignals() as stop, signals.killed_children():
        stalled = batches(data, pairs)
        assert stop.next(stalled) is None and stop.received == signal.SIGTERM
    processes = getattr(stalled, "_workers", [])
    for process in processes:
        process.join(timeout=60)
    assert len(processes) == workers and not any(process.is_alive() for process in processes)


def test_a_stop_request_ends_an_index_whose_reads_stall(server, shards, settings, stop_when_stalled):
    stop_when_stalled(2)  # the size is asked for once here, once in the process that reads the shard
    signals.install_signal_handlers()
    with pytest.raises(KeyboardInterrupt):
        open_pairs(settings(server.url("{0..1}.tar")))
