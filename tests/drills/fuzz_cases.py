"""What scripts/fuzz.py feeds to the readers: broken shards, tables and configs, each drawn from one random.Random."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from clipn.config.schema import Config
from clipn.data.shards import IMAGE_KINDS

Files = dict[str, bytes]  # of one case; "case.json" says how they are read

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

SCRAPS = [b"\0", b"\n", b"\r", b'"', b"'", b",", b"\t", b"/", b"..", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc2\x85", b"\x1c"]
SCRAPS += [b"\xe2\x80\xa8", b"\xed\xa0\x80", b"9" * 5000, b"-1", b"1e999", b"0x" + b"f" * 5000, b"[" * 3000, b"{}"]
SCRAPS += [
    b": ",
    b"- ",
    b"? ",
    b"|\n a",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"!!float ",
    b"!!binary ",
    b"${",
    b"!!set ",
]

IMAGE_MODES = {"JPEG": "RGB L CMYK", "PNG": "RGB L P 1 LA RGBA I;16", "WEBP": "RGB RGBA", "GIF": "L P", "BMP": "RGB"}
IMAGE_MODES |= {"TIFF": "RGB I F CMYK I;16", "PPM": "RGB L I", "TGA": "RGB", "ICO": "RGBA", "JPEG2000": "RGB L"}
CAPTIONS = [b"", b" \n", b"caf\xe9", "un café 🦉".encode(), b"\xff\xfea\0", b"{} {0}", b"a" * 10_000, b"a b " * 9000]
CAPTIONS += [b"\xed\xa0\x80", b"two\r\nlines", b"\xef\xbb\xbfx", b"&amp;<b>", b"\xe2\x80\xa8", b"!" * 3000, b"\0"]
JSONS = [b'{"caption": 3}', b'{"caption": null}', b'{"a\\nb": 1, "\\ud800": 2}', b"[]", b"null", b"x", b"", b"9" * 5000]
JSONS += [b'{"caption": "\\ud800"}', b'{"caption": "a\\u0000\\n"}', b'{"caption": NaN}', b"[" * 100_000, b'{"c']
JSONS += [b'{"caption": ["x"]}', b'\xef\xbb\xbf{"caption": "x"}', b'{"caption": "x", "caption": {}}', b'{"": "x"}']

STEMS = ["0", "1", "a/1", "a.b", "", ".", "..", "/", "/1", "é", "\n", "\udcff", "x" * 99, "y" * 300, "d/" * 200]
KINDS = ["jpg", "jpg", "png", "webp", "JPEG", "txt", "txt", "json", "TXT", "cls", "seg.png", "", "x" * 200]
TYPES = [b"\0", *(b"%c" % letter for letter in b"01234567DKLMSVXgx?")]
HEADER = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "time": (136, 12), "sum": (148, 8), "type": (156, 1)}
HEADER |= {"link": (157, 100), "magic": (257, 8), "prefix": (345, 155), "sparse": (386, 24), "real": (483, 12)}
NUMBERS = [
    b"\xff" * 12,
    b"\xff" * 10 + b"\xfe\0",
    b"\xff" * 9 + b"\xf8\0\0",
    b"\x80\0\0\0\x7f" + b"\xff" * 7,
    b"x",
    b"",
]
NUMBERS += [b"\x80" + b"\xff" * 11, b"7" * 11, b"-1000", b"0", b"1", b"1000", b"1001", b"20000", b"100000000"]
PAX = {"size": ["-512", "-1", "0", "3", "1" * 30, "x"], "path": ["", "/", "0.jpg", "\n", "x" * 9999], "mtime": ["nan"]}
PAX |= {"GNU.sparse.map": ["0,5", "0,-512", "x", ""], "GNU.sparse.size": ["9", "x", "1" * 5000]}
PAX |= {"GNU.sparse.major": ["1"], "GNU.sparse.minor": ["0"], "GNU.sparse.realsize": ["9", "-9", "x"]}
PAX |= {"GNU.sparse.name": ["0.txt"], "hdrcharset": ["BINARY", "x"]}

PLACES = ["1.png", "2.jpg", "nowhere.png", "", ".", "..", "/", "/etc", "1.png/x", "a\0b", "~", "é", "\n", "\u2028"]
PLACES += ["x" * 300, "y" * 5000]

VALUES = ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "&a [*a]", "${run}", "${base}", "${.x}"]
VALUES += ["${oc.env:HOME}", "${oc.env:NO}", "${oc.create:{a: 1}}", "${oc.decode:'['}", "${x:1}", "${..x}", "'${'", "0"]
VALUES += ["[" * 300, "{a: " * 300, "${" * 300, "1" * 5000, "-0x" + "f" * 5000, "1e400", "1" * 400, ".nan", "-.inf"]
VALUES += ["2001-01-01", "!!timestamp x", "!!binary x", "!!set {a}", "{? [1] : 2}", "{null: 3}", "null", "''", "[]"]
VALUES += ["{}", "-1", "1.5", "true", "[1, [2]]", "{train: {lr: x}}", '"\\ud800"', '"a\\nb"', "🦉", "???", "cuda:²"]
VALUES += ["'\\${run.dir}'", "'${${run.dir}}'", "1:59:59", '"${a\\nb}"', '{"a\\nb": 1}', "'\u2028'", "[a, a]"]


def shard_files(rng: random.Random) -> Files:
    """One or two shards, and sometimes a sizes.json."""
    files, paths = {}, [f"{number}.tar" for number in range(rng.choice((1, 1, 2)))]
    for path in paths:
        data, places = _tar(rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            data = _forged(rng, data, rng.choice(places))
        files[path] = _mutated(rng, data) if rng.random() < 0.3 else data
    if rng.random() < 0.05:
        files["sizes.json"] = rng.choice((*JSONS, b'{"0.tar": 3}', b'{"0.tar": "\\n"}', b'[["0.tar", 1]]'))
    key = rng.choice((*[None] * 6, "caption", "alt", "\n"))
    return files | _settings(shards=paths, caption_key=key, max_bad_fraction=rng.choice((*[1.0] * 9, 0.05)))


def table_files(rng: random.Random) -> Files:
    """A table, and two images beside it."""
    path, mark = rng.choice((("x.csv", ","), ("x.tsv", "\t")))
    rows = [["filepath", "title", *rng.choice(([], [], ["é"], ["title"], ["", ""], ["\n"]))]]
    rows[0] = rows[0] if rng.random() < 0.9 else rng.sample(rows[0], rng.randrange(len(rows[0])))
    for _ in range(rng.choice((0, *range(1, 9)))):
        caption = _caption(rng, "txt").decode("latin-1")
        rows.append(
            [rng.choice(PLACES[:2] if rng.random() < 0.6 else PLACES), caption, *rng.choice((*[[]] * 9, ["more"]))]
        )
    if rng.random() < 0.8:
        rows = [['"' + word.replace('"', '""') + '"' for word in row] for row in rows]
    text = rng.choice(("\n", "\n", "\r\n", "\r")).join(mark.join(row) for row in rows)
    data = text.encode(rng.choice((*["utf-8"] * 7, "utf-8-sig", "latin-1", "utf-16")), "replace")
    names = [rng.choice([name] * 30 + ["", "é", "\n", "Unnamed: 2"]) for name in ("filepath", "title")]
    images = {name: _image(rng) for name in PLACES[:2]}
    more = _settings(shards=path, image_column=names[0], caption_column=names[1])
    return {path: _mutated(rng, data) if rng.random() < 0.4 else data} | images | more


def config_files(rng: random.Random) -> Files:
    """A config, one of the project's or of random values, with some lines changed, and words of the command line."""
    projects = [path.read_text("utf-8") for path in sorted(CONFIGS.glob("*.yaml"))]
    lines = (rng.choice(projects) if rng.random() < 0.5 else _values(rng)).split("\n")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(lines))
        changed = f"{lines[at].partition(':')[0]}: {rng.choice(VALUES)}"
        lines[at : at + 1] = rng.choice((*[[changed]] * 6, [""], lines[at : at + 1] * 2, [lines[at], _bomb(rng)]))
    data = "\n".join(lines).encode()
    words = []
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        word = f"{rng.choice((*_keys(), 'base.train.lr', 'eval.id.x', 'no'))}={rng.choice(VALUES)}".encode()
        words.append((_mutated(rng, word) if rng.random() < 0.3 else word).decode("utf-8", "surrogateescape"))
    return {"x.yaml": _mutated(rng, data) if rng.random() < 0.2 else data} | _settings(words=words)


def _settings(**values: Any) -> Files:
    return {"case.json": json.dumps(values, indent=1).encode()}


def _mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes after a few accidents."""
    edited = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start, size = rng.randrange(len(edited) + 1), rng.choice((1, 1, 4, 16, 100, 512))
        other = rng.randrange(len(edited) + 1)
        stop = len(edited) if rng.random() < 0.1 else start + rng.choice((0, size, size))
        pieces = (rng.randbytes(size), bytes(size), b"", edited[other : other + size], rng.choice(SCRAPS))
        edited[start:stop] = rng.choice(pieces)
    return bytes(edited)


@cache
def _images() -> list[bytes]:
    """Small images of many formats and modes, the usual ones first."""
    picture, found = Image.linear_gradient("L").resize((20, 14)), []
    for kind, modes in IMAGE_MODES.items():
        for mode in modes.split():
            stream = io.BytesIO()
            picture.convert("L" if mode == "I;16" else "RGB").convert(mode).save(stream, kind)
            found.append(stream.getvalue())
    return found


def _image(rng: random.Random) -> bytes:
    """Most often a whole image; else a broken one, or one that claims any size."""
    data = rng.choice(_images()[: rng.choice((1, 4, 99))])
    if rng.random() < 0.7:
        return data
    sizes = [rng.choice((0, 1, 20, 5000, 60_000, 2**31)) for _ in range(2)]
    head = b"IHDR" + struct.pack(">IIBBBBB", *sizes, rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), 0, 0, 0)
    claim = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return rng.choice((b"", claim, claim + data[33:], b"P6 %d %d 255 " % tuple(sizes), *[_mutated(rng, data)] * 4))


def _caption(rng: random.Random, kind: str) -> bytes:
    """Most often a good one."""
    good, odd = (b'{"caption": "a dog", "alt": "b"}', JSONS) if kind == "json" else (b"a dog, running", CAPTIONS)
    return good if rng.random() < 0.7 else rng.choice([*odd, _mutated(rng, good)])


def _tar(rng: random.Random) -> tuple[bytes, list[int]]:
    """A tar of some samples, and where its headers are."""
    stream, places, texts = io.BytesIO(), [], rng.choice((["txt"], ["json"], ["txt", "json"]))
    with tarfile.open(fileobj=stream, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as archive:
        for number in range(rng.randint(2, 9)):
            stem = rng.choice(STEMS) if rng.random() < 0.2 else f"{number:05d}"
            kinds = [rng.choice(KINDS) if rng.random() < 0.05 else kind for kind in ("jpg", rng.choice(texts))]
            for kind in rng.choice((*[kinds] * 5, kinds[::-1], [*kinds, "json"], kinds[:1], kinds * 2)):
                content = _image(rng) if kind.lower() in IMAGE_KINDS else _caption(rng, kind)
                places.append(archive.offset)
                archive.addfile(_member(rng, f"{stem}.{kind}", len(content)), io.BytesIO(content))
    return stream.getvalue(), places


def _member(rng: random.Random, name: str, size: int) -> tarfile.TarInfo:
    """A tar header, sometimes of an odd type or with extended headers."""
    member = tarfile.TarInfo(name)
    member.size = size
    if rng.random() < 0.07:
        member.type, member.linkname = rng.choice(TYPES), rng.choice(STEMS)
    if rng.random() < 0.07:
        member.pax_headers = {key: rng.choice(PAX[key]) for key in rng.sample(list(PAX), rng.randint(1, 4))}
    return member


def _forged(rng: random.Random, data: bytes, place: int) -> bytes:
    """The tar with another value in a field of the header at `place`, and most often with its checksum mended."""
    name = rng.choice(list(HEADER))
    start, width = HEADER[name]
    texts = [rng.randbytes(width), bytes(width), b"\xff" * width, *(stem.encode("utf-8", "replace") for stem in STEMS)]
    value = rng.choice(TYPES if name == "type" else NUMBERS if name in ("size", "sparse", "real") else texts)
    header = bytearray(data[place : place + 512])
    header[start : start + width] = value[:width].ljust(width, b"\0")
    if name != "sum":
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * ord(" ") + sum(header[156:]))
    return data[:place] + bytes(header) + data[place + 512 :]


def _keys(section: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every key of a config, dotted."""
    for field in fields(section):
        yield prefix + field.name
        if is_dataclass(field.default_factory):
            yield from _keys(field.default_factory, f"{prefix}{field.name}.")


def _values(rng: random.Random) -> str:
    """A config of odd values for some keys."""
    sections: dict[str, list[str]] = {}
    for key in rng.sample([key for key in _keys() if "." in key], rng.randint(0, 3)):
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name}: {rng.choice(VALUES)}")
    return "\n".join(f"{section}: {{{', '.join(entries)}}}" for section, entries in sections.items())


def _bomb(rng: random.Random) -> str:
    """YAML aliases of aliases: some hundred values in a few lines."""
    wide, deep = rng.choice(((2, 8), (4, 4), (9, 3)))
    lists = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * wide)}]" for level in range(1, deep)]
    return "\n  ".join(["base:", "a0: &a0 [1]", *lists])
