"""Fuzzing of the readers of shards, tables and configs. Not part of the tests; by hand:

    pytest tests/drills/fuzz.py                                    200 examples of each, about a minute
    FUZZ_EXAMPLES=20000 pytest tests/drills/fuzz.py -k shards      for longer

Every input must end in LIMIT seconds: without an error, or with a ValueError or OSError of one line that names the file
or the key. Images and captions must be members of their shard, a bad pair must be replaced by a good one and counted,
and each log message must be one line. Hypothesis shrinks an input that fails, prints it, and repeats it next time.
"""

import io
import json
import logging
import os
import signal
import tarfile
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from helpers import default_preprocess, image_bytes, png_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipn.config.loading import load_config, to_dict
from clipn.config.schema import Config, DataConfig
from clipn.data.images import pixel_transform
from clipn.data.pairs import PairDataset, open_pairs
from clipn.data.shards import CAUSES, IMAGE_KINDS, BadPair
from clipn.model.base import get_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOKENIZER = get_tokenizer(str(CONFIGS / "toy_model.json"))
LIMIT = 20  # seconds
LARGEST_MEMBER = 10**7  # bytes that tarfile is asked for: a sparse member may claim any size
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 200))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

# Inputs

SCRAPS = [b"\n", b'"', b",", b"\xff\xfe", b"\xc2\x85", b"\x1c", b"{}", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"9" * 5000]
SCRAPS += [b"-1", b"1e999", b"[" * 3000, b": ", b"- ", b"|\n a", b"&a ", b"*a", b"!!binary ", b"${", b"a b " * 9000]
JSONS = [b'{"a\\nb": 1, "\\ud800": 2}', b'{"caption": "\\ud800"}', b"9" * 5000, b"[" * 100_000, b'{"caption": ["x"]}']
STEMS = ["0", "a/1", "a.b", "", ".", "..", "/", "é", "\n", "\udcff", "x" * 99, "y" * 300, "d/" * 200]
KINDS = ["png", "webp", "JPEG", "txt", "json", "TXT", "cls", "seg.png", "", "x" * 200]
HEADER = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "time": (136, 12), "sum": (148, 8), "type": (156, 1)}
HEADER |= {"link": (157, 100), "magic": (257, 8), "prefix": (345, 155), "sparse": (386, 24), "real": (483, 12)}
TYPES = [b"%c" % letter for letter in b"\x0001234567DKLMSVXgx?"]
NUMBERS = [b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\x80\0\0\0\x7f" + b"\xff" * 7, b"x", b"7" * 11, b"-1000", b"0"]
PAX = {"size": ["-512", "3", "1" * 30, "x"], "path": ["", "/", "\n"], "mtime": ["nan"], "hdrcharset": ["BINARY", "x"]}
PAX |= {"GNU.sparse.map": ["0,5", "0,-512", "x"], "GNU.sparse.size": ["9", "1" * 5000], "GNU.sparse.major": ["1"]}
PAX |= {"GNU.sparse.minor": ["0"], "GNU.sparse.realsize": ["9", "-9", "x"], "GNU.sparse.name": ["0.txt"]}
PLACES = ["nowhere.png", "", ".", "/", "/etc", "1.png/x", "a\0b", "~", "\n", "\u2028", "y" * 5000]
VALUES = r"""!!python/object/apply:os.getcwd []  &a [*a]  ${run}  ${base}  ${.x}  ${oc.env:HOME}  ${oc.env:NO}  ${x:1}
${oc.create:{a: 1}}  ${oc.decode:'['}  ${..x}  '${'  0  1e400  .nan  -.inf  2001-01-01  !!timestamp x  !!binary x  null
!!set {a}  {? [1] : 2}  {null: 3}  ''  []  {}  -1  1.5  true  [1, [2]]  {train: {lr: x}}  "\ud800"  "a\nb"  ???  cuda:²
'\${run.dir}'  '${${run.dir}}'  1:59:59  [a, a]""".replace("\n", "  ").split("  ")
VALUES += ["[" * 300, "{a: " * 300, "${" * 99, "1" * 5000, "-0x" + "f" * 5000, "'\u2028'"]
KEYS = [f"{section}.{key}" for section, values in to_dict(Config()).items() for key in values or [""]]


def mostly(usual: object, *others: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 9).flatmap(lambda n: st.one_of(*others) if n == 9 else st.just(usual))


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes after some edits: something inserted, replaced, copied or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start, other = draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))
        stop = draw(st.sampled_from([start, start + 1, start + 16, start + 512, len(data)]))
        scrap = st.sampled_from(SCRAPS) | st.binary(max_size=100) | st.just(data[other : other + 512])
        data = data[:start] + draw(scrap) + data[stop:]
    return data


def encoded(kind: str, mode: str) -> bytes:
    gradient, stream = Image.linear_gradient("L").resize((20, 14)), io.BytesIO()
    gradient.convert("L" if mode == "I;16" else "RGB").convert(mode).save(stream, kind)
    return stream.getvalue()


MODES = {"JPEG": "RGB CMYK", "PNG": "L P 1 LA RGBA I;16", "WEBP": "RGBA", "GIF": "P", "BMP": "RGB", "TIFF": "I F CMYK"}
MODES |= {"PPM": "RGB", "TGA": "RGB", "ICO": "RGBA", "JPEG2000": "L"}
IMAGES = st.sampled_from([encoded(kind, mode) for kind, modes in MODES.items() for mode in modes.split()])
SIDE = st.sampled_from([0, 1, 20, 5000, 60_000, 2**31])
IMAGE = mostly(image_bytes(), IMAGES, IMAGES.flatmap(mutated), st.builds(png_header, SIDE, SIDE))
CAPTION = mostly(b"a dog, running", st.sampled_from(SCRAPS), st.binary(), st.text().map(str.encode))
JSON_VALUES = st.dictionaries(st.sampled_from(["caption", "alt", "\n"]), st.none() | st.floats() | st.text())
JSON = st.just(b'{"caption": "a dog"}') | st.sampled_from(JSONS) | JSON_VALUES.map(json.dumps).map(str.encode)
CONTENT = dict.fromkeys(IMAGE_KINDS, IMAGE) | {"json": JSON}


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A shard of some samples; one header may be forged, most often with a valid checksum, and its bytes mutated."""
    stream, places = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=draw(st.sampled_from([1, 2]))) as archive:
        for number in range(draw(st.integers(2, 6))):
            stem = draw(mostly(f"{number:05d}", st.sampled_from(STEMS)))
            texts = draw(st.sampled_from([["txt"], ["txt"], ["json"], ["txt", "json"], [], ["txt", "jpg"]]))
            for kind in draw(st.permutations(["jpg", *texts])):
                member = tarfile.TarInfo(f"{stem}.{draw(mostly(kind, st.sampled_from(KINDS)))}")
                content = draw(CONTENT.get(member.name.rpartition(".")[2].lower(), CAPTION))
                member.size, member.type = len(content), draw(mostly(tarfile.REGTYPE, st.sampled_from(TYPES)))
                pax = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in PAX.items()})
                member.pax_headers = draw(mostly({}, pax))
                places.append(archive.offset)
                archive.addfile(member, io.BytesIO(content))
    data = stream.getvalue()
    if draw(st.booleans()):
        place, name = draw(st.sampled_from(places)), draw(st.sampled_from(sorted(HEADER)))
        start, width = HEADER[name]
        values = {"type": TYPES}.get(name, NUMBERS if name in ("size", "sparse", "real") else SCRAPS)
        header = bytearray(data[place : place + 512])
        header[start : start + width] = draw(st.sampled_from(values))[:width].ljust(width, b"\0")
        if name != "sum":
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * ord(" ") + sum(header[156:]))
        data = data[:place] + bytes(header) + data[place + 512 :]
    return draw(mostly(data, mutated(data)))


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """The bytes of a table, most often with the columns filepath and title."""
    cells = st.sampled_from(PLACES) | CAPTION.map(lambda text: text.decode("latin-1"))
    rows = [draw(mostly(["filepath", "title"], st.lists(st.sampled_from(["filepath", "title", "é", "", "\n"]))))]
    rows += draw(st.lists(mostly(["1.png", "a dog"], st.lists(cells, min_size=2, max_size=3)), max_size=8))
    if draw(st.booleans()):
        rows = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(",".join(row) for row in rows)
    data = text.encode(draw(mostly("utf-8", st.sampled_from(["utf-8-sig", "latin-1", "utf-16"]))), "replace")
    return draw(mostly(data, mutated(data)))


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """One of the project's configs with some lines changed."""
    lines = draw(st.sampled_from([path.read_text("utf-8") for path in sorted(CONFIGS.glob("*.yaml"))])).split("\n")
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        changed = f"{lines[place].partition(':')[0]}: {draw(st.sampled_from(VALUES))}"
        lines[place : place + 1] = draw(st.sampled_from([[changed], [changed], [""], lines[place : place + 1] * 2]))
    data = "\n".join(lines).encode()
    return draw(mostly(data, mutated(data)))


WORD = st.builds("{}={}".format, st.sampled_from([*KEYS, "base.train.lr", "no"]), st.sampled_from(VALUES))
WORDS = st.lists(WORD | WORD.flatmap(lambda word: mutated(word.encode())).map(os.fsdecode), max_size=3)


# Checks


class TooLong(BaseException):
    """Not an Exception, which the readers may catch."""


@contextmanager
def one_clear_end():
    """A folder for the input; raises AssertionError for any other end than those of the module's docstring."""

    def stop(number: int, frame: object) -> None:
        raise TooLong

    messages, handler, log = [], logging.Handler(), logging.getLogger("clipn")
    handler.emit = lambda record: messages.append(record.getMessage().encode().decode())  # as a log file encodes it
    log.addHandler(handler)
    log.propagate = False
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Path(folder)
    except (ValueError, OSError) as error:
        messages.append(str(error))
        assert any(name in str(error) for name in (folder, "data.", "command line")), f"names no file or key: {error}"
    except TooLong:
        raise AssertionError(f"no end in {LIMIT} s") from None
    finally:
        signal.alarm(0)
        log.removeHandler(handler)
    for message in messages:
        assert len(message.splitlines()) == 1 and "Traceback" not in message, message


def members(path: Path):
    """The members of a tar, as far as tarfile reads it."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if archive.offset < member.offset_data:  # a negative size: without end in older Pythons
                    return
                if member.isreg() and member.size < LARGEST_MEMBER:
                    yield archive.extractfile(member).read()
    except Exception:  # of any kind: the readers under test must report it
        return


def check_pairs(pairs, contents: list[set[bytes]] | None = None) -> None:
    """Check that a good pair is returned as it is, a bad one replaced by a good one and its cause counted."""
    dataset = PairDataset(pairs, pixel_transform(default_preprocess(16)), TOKENIZER)
    alone: list[dict[str, torch.Tensor] | str] = []  # the sample, or the cause of a bad pair
    for number in range(len(pairs)):
        try:
            alone += dataset.views(pairs[number], number, [0])
        except BadPair as error:
            alone.append(error.cause)
            continue
        if contents:
            members, pair, is_json = contents[pairs.index.shard[number]], pairs[number], pairs.index.text_is_json
            assert pair.image in members, f"the image of pair {number} is no member"
            assert is_json[number] or pair.caption.encode() in members, f"caption {number} is no member"
    for number, own in enumerate(alone):
        try:
            sample = dataset[(0, number)]
        except ValueError:
            assert isinstance(own, str), f"pair {number} is good"
            raise
        counted, source = {CAUSES[place] for place in sample["skipped"].nonzero()}, alone[sample["number"]]
        assert isinstance(source, dict) and torch.equal(sample["tokens"], source["tokens"]), f"replacement of {number}"
        if isinstance(own, str):
            assert own in counted and counted <= {cause for cause in alone if isinstance(cause, str)}, number
        else:
            assert sample["number"] == number and not counted and torch.equal(sample["image"], own["image"]), number


@fuzz
@given(tars=st.lists(shards(), min_size=1, max_size=2), sizes=mostly(None, JSON), key=mostly(None, st.just("alt")))
def test_shards(tars, sizes, key):
    one_process = nullcontext(SimpleNamespace(map=map))  # an alarm does not reach another process
    with one_clear_end() as folder, patch("clipn.data.shards.ProcessPoolExecutor", return_value=one_process):
        paths = [folder / f"{number}.tar" for number in range(len(tars))]
        for path, content in zip([*paths, folder / "sizes.json"], [*tars, sizes], strict=True):
            path.write_bytes(content or b"{}")
        data = DataConfig(shards=[*map(str, paths)], caption_key=key, index_dir=str(folder), max_bad_fraction=1.0)
        check_pairs(open_pairs(data), [set(members(path)) for path in paths])


@fuzz
@given(table=tables(), image=IMAGE, column=mostly("title", st.sampled_from(["é", "", "\n"])))
def test_tables(table, image, column):
    with one_clear_end() as folder:
        (folder / "1.png").write_bytes(image)
        (folder / "x.csv").write_bytes(table)
        check_pairs(open_pairs(DataConfig(shards=str(folder / "x.csv"), caption_column=column)))


@fuzz
@given(content=configs(), words=WORDS)
def test_configs(content, words):
    with one_clear_end() as folder:
        (folder / "x.yaml").write_bytes(content)
        load_config(folder / "x.yaml", words)
