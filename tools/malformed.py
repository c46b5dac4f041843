"""Malformed files beside good ones, and what becomes of them when they are read as a run reads them.

python -m tools.malformed modality=vision|speech|text [count=200] [good=32] [seed=0] [folder=FOLDER]   # prints one JSON object
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image

from mmssl.config import Recipe
from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import open_source
from mmssl.registry import modality
from modalities.text.data import MAX_BYTES
from modalities.text.tokenizer import train

RATE, VOCABULARY = 16_000, 300
RECIPES = {"vision": "vision/mae-demo", "speech": "speech/data2vec2-demo", "text": "text/mlm-demo"}
TEXT = "The cat sat on the mat, and 17 dogs looked on; naïve façades, 語, Ω and 🙂 are text as well."

Content = bytes | Callable[[Path], None]  # of a file, or what makes one that bytes cannot
Kind = Callable[[random.Random], Content]


class Found(NamedTuple):
    """What became of a folder of files."""

    bad: set[str]  # names of the malformed files
    named: set[str]  # names in the quarantine
    good: int  # files that can be used
    used: int  # samples that came back as themselves
    reasons: dict[str, int]  # kind of rejection -> how many
    slowest: float  # seconds of one sample
    megabytes: float  # by which the most memory of this process grew

    @property
    def sound(self) -> bool:
        """All malformed files are named, no other is, and all good ones are used."""
        return self.named == self.bad and self.used == self.good


# Images -------------------------------------------------------------------------------------------------------------


def photo(draw: random.Random, width: int = 64, height: int = 48) -> Image.Image:
    """Of random pixels."""
    return Image.frombytes("RGB", (width, height), draw.randbytes(width * height * 3))


def picture(draw: random.Random, form: str = "", image: Image.Image | None = None) -> bytes:
    """The file of an image, of any common format if none is named."""
    file = io.BytesIO()
    (image or photo(draw)).save(file, form or draw.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"]))
    return file.getvalue()


def png(width: int, height: int, more: bytes = b"", pixels: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def sized(draw: random.Random, sides: list[int]) -> bytes:
    """A header that declares one of these widths and heights, and no pixels."""
    width, height = draw.choice(sides), draw.choice(sides)
    small = min(width, 65535), min(height, 65535)
    return draw.choice(
        [
            png(width & 0x7FFFFFFF, height & 0x7FFFFFFF),
            b"P6 %d %d 255\n" % (width, height),
            b"GIF89a" + struct.pack("<HHBBB", *small, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, *small, 0) + b"\x02\x00;",
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, width & 0x7FFFFFFF, height & 0x7FFFFFFF, 1, 24, *[0] * 6),
        ]
    )


def flipped(draw: random.Random) -> bytes:
    """A PNG whose header does not match its checksum."""
    data = bytearray(picture(draw, "PNG"))
    data[draw.randrange(16, 29)] ^= 1 << draw.randrange(8)
    return bytes(data)


def not_a_number(draw: random.Random) -> bytes:
    """Pixels that are no numbers."""
    pixels = np.full((8, 8), draw.random(), np.float32)
    pixels[draw.randrange(8), draw.randrange(8)] = draw.choice([np.nan, np.inf, -np.inf])
    return picture(draw, "TIFF", Image.fromarray(pixels))


def page(draw: random.Random) -> bytes:
    """What servers send in place of a file, and documents that only look like pictures."""
    return draw.choice(
        [
            b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
            b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/tmp/canary) (w) file closefile\n",
            b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>",
        ]
    )


# Sounds -------------------------------------------------------------------------------------------------------------


def sound(draw: random.Random, form: str = "WAV", subtype: str | None = None, samples: int = 8000, rate: int = RATE) -> bytes:
    """The file of some noise."""
    file, noise = io.BytesIO(), np.random.default_rng(draw.randrange(2**32)).normal(0, 0.1, samples)
    soundfile.write(file, noise.astype(np.float32), rate, format=form, subtype=subtype)
    return file.getvalue()


def whole_sound(draw: random.Random) -> bytes:
    """In a format that tells how long it is."""
    return sound(draw, draw.choice(["WAV", "AIFF", "AU", "FLAC"]), "PCM_16")


def header(place: int, layout: str, values: list[int]) -> Kind:
    """A wave file with another number in its header."""

    def make(draw: random.Random) -> bytes:
        data = bytearray(sound(draw, "WAV", "PCM_16"))
        struct.pack_into(layout, data, place, draw.choice(values))
        return bytes(data)

    return make


def endless(draw: random.Random) -> bytes:
    """A FLAC that says it has up to 2^36 samples."""
    data = bytearray(sound(draw, "FLAC", "PCM_16"))
    (word,) = struct.unpack_from(">Q", data, 18)  # rate, channels, bits, and 36 bits of how many samples
    struct.pack_into(">Q", data, 18, word >> 36 << 36 | draw.choice([10**9, 2**35, 2**36 - 1]))
    return bytes(data)


def not_a_sound(draw: random.Random) -> bytes:
    """Samples that are no numbers."""
    wave = np.zeros(8000, np.float32)
    wave[draw.randrange(8000)] = draw.choice([np.nan, np.inf, -np.inf])
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def long_sound(draw: random.Random) -> bytes:
    """More than half an hour of silence, which takes next to no place."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1000 * (1801 + draw.randrange(100)), np.int16), 1000, format="FLAC")
    return file.getvalue()


# Texts --------------------------------------------------------------------------------------------------------------


def prose(draw: random.Random, words: int = 8) -> str:
    """Some words."""
    return " ".join(draw.choices(TEXT.split(), k=words))


def spoilt(*pieces: bytes) -> Kind:
    """Prose with bytes in it that are no UTF-8."""

    def make(draw: random.Random) -> bytes:
        return prose(draw).encode() + draw.choice(pieces) + prose(draw).encode()

    return make


def huge(path: Path) -> None:
    """A file that is larger than what is read; it takes no place on the disk."""
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


# All of them --------------------------------------------------------------------------------------------------------


def cut(make: Callable[[random.Random], bytes]) -> Kind:
    """What a broken connection leaves."""

    def cut_off(draw: random.Random) -> bytes:
        data = make(draw)
        return data[: int(len(data) * draw.uniform(0.2, 0.9))]

    return cut_off


def first(make: Callable[[random.Random], bytes], most: int) -> Kind:
    """The first bytes only."""
    return lambda draw: make(draw)[: draw.randint(1, most)]


def nested(draw: random.Random) -> bytes:
    """An archive of archives, of a gigabyte of nothing."""
    data = bytes(1 << 20)
    for _ in range(draw.randint(2, 4)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(4):
                archive.writestr(zipfile.ZipInfo(f"../{i}.zip"), data, zipfile.ZIP_DEFLATED)
        data = file.getvalue()
    return data


def link(path: Path) -> None:
    """A link that leads nowhere."""
    path.symlink_to(path.parent / "nowhere")


ANY: dict[str, Kind] = {
    "empty": lambda draw: b"",
    "zeros": lambda draw: bytes(draw.randint(1, 5000)),
    "noise": lambda draw: b"\xfe\xff" + draw.randbytes(draw.randint(500, 5000)),
    "gzip": lambda draw: gzip.compress(bytes(10**6), mtime=0),
    "nested": nested,
    "pickle": lambda draw: pickle.dumps({"code": draw.randbytes(20)}),
    "program": lambda draw: b"\x7fELF\x02\x01\x01" + bytes(100) + draw.randbytes(100),
    "link": lambda draw: link,
    "pipe": lambda draw: os.mkfifo,  # reading it would wait for ever
}
KINDS: dict[str, dict[str, Kind]] = {
    "vision": {
        "truncated": cut(picture),
        "beginning": first(picture, 20),
        "nothing": lambda draw: sized(draw, [0]),
        "absurd": lambda draw: sized(draw, [40_000, 10**6, 2**31 - 1]),
        "bomb": lambda draw: png(9000, 9000, pixels=bytes(9000 * 1126), depth=1, colour=0),
        "text-bomb": lambda draw: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))),
        "checksum": flipped,
        "nan": not_a_number,
        "page": page,
        "sound": sound,
    },
    "speech": {
        "truncated": cut(whole_sound),
        "beginning": first(whole_sound, 40),
        "nothing": lambda draw: sound(draw, draw.choice(["WAV", "FLAC", "AIFF"]), samples=0),
        "short": lambda draw: sound(draw, samples=draw.randint(1, 399)),
        "long": long_sound,
        "rate": header(24, "<I", [0, 1, 999, 2**31 - 1, 2**32 - 1]),
        "channels": header(22, "<H", [0, 2000, 65535]),
        "bits": header(34, "<H", [0, 7777, 65535]),
        "codec": header(20, "<H", [0, 0x9999, 0xFFFF]),
        "promise": header(40, "<I", [10**9, 10**6]),
        "endless": endless,
        "nan": not_a_sound,
        "page": page,
        "picture": picture,
    },
    "text": {
        "blank": lambda draw: draw.choice([b" \n\t", b"\xef\xbb\xbf", "\u2003\u00a0".encode()]),
        "nul": spoilt(b"\0"),
        "latin": spoilt(b"caf\xe9 "),
        "overlong": spoilt(b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf5\x80\x80\x80"),
        "surrogate": spoilt(b"\xed\xa0\x80", b"\xed\xbf\xbf"),
        "cut": lambda draw: (prose(draw) + " 語").encode()[: -draw.randint(1, 2)],
        "utf16": lambda draw: prose(draw).encode("utf-16"),
        "huge": lambda draw: huge,
        "picture": lambda draw: picture(draw, "JPEG"),
        "sound": sound,
    },
}
SUFFIXES = {"vision": (".png", ".jpg", ".webp", ".tiff"), "speech": (".wav", ".flac", ".ogg"), "text": (".txt", ".md")}
GOOD: dict[str, list[Callable[[random.Random], bytes]]] = {
    "vision": [
        picture,
        lambda draw: picture(draw, "PNG", photo(draw).convert(draw.choice(["L", "1", "P", "LA", "RGBA"]))),
        lambda draw: picture(draw, "JPEG", photo(draw).convert("CMYK")),
        lambda draw: picture(draw, "PNG", Image.fromarray(np.full((3, 4), draw.randrange(1 << 16), np.uint16))),
        lambda draw: picture(draw, "PNG", photo(draw, 1, 1)),
    ],
    "speech": [
        sound,
        lambda draw: sound(draw, draw.choice(["FLAC", "OGG", "MP3", "AIFF"]), samples=44_100, rate=44_100),
        lambda draw: sound(draw, "WAV", "DOUBLE", rate=8000),
        lambda draw: sound(draw, "WAV", draw.choice(["PCM_U8", "ULAW", "PCM_24"])),
    ],
    "text": [
        lambda draw: prose(draw).encode(),
        lambda draw: b"\xef\xbb\xbf" + prose(draw).replace(" ", "\r\n").encode(),
        lambda draw: "\u200b\ufffd\U000e0001 \x07".encode() + prose(draw).encode(),
        lambda draw: b"<s> <mask> " + prose(draw).encode(),
    ],
}


def write(folder: Path, name: str, count: int, good: int, seed: int) -> set[str]:
    """Fill a folder.

    Args:
        name: modality.
        count: malformed files, of all kinds in turn; `good`: others.
        seed: the same files for the same seed.
    Returns: names of the malformed ones.
    """
    draw, kinds, bad = random.Random(f"{name} {seed}"), ANY | KINDS[name], set()
    for i in range(count):
        what = [*kinds][i % len(kinds)]
        path = folder / f"bad-{i:04}-{what}{draw.choice(SUFFIXES[name])}"
        content = kinds[what](draw)
        content(path) if callable(content) else path.write_bytes(content)
        bad.add(path.name)
    for i in range(good):
        (folder / f"good-{i:04}{draw.choice(SUFFIXES[name])}").write_bytes(GOOD[name][i % len(GOOD[name])](draw))
    return bad


def read(place: Path, name: str, count: int, good: int, seed: int) -> Found:
    """Write files into `place/data` and ask for each of them, as a run would."""
    folder, ledger = place / "data", place / "quarantine.jsonl"
    folder.mkdir()
    bad = write(folder, name, count, good, seed)
    kind, recipe = modality(name), Recipe.load(RECIPES[name], f"data.path={folder}", *_words(name, place))
    before, slowest, used = _most_memory(), 0.0, 0
    views, quarantine = recipe.build_views(), Quarantine(ledger, 1.0, 0)
    source = open_source(recipe.data, kind, recipe.data.split)
    if kind.prepare is not None:
        source = kind.prepare(source, views, quarantine)
    dataset = KeyedDataset(source, kind, views, seed, quarantine)
    for index in range(source.size):
        if source.lengths is None or source.lengths[index] >= 0:
            start = time.monotonic()
            used += int(dataset[0, index]["index"]) == index  # a bad one is replaced by another
            slowest = max(slowest, time.monotonic() - start)
    named = {Path(json.loads(line)["identity"]).name for line in ledger.read_text().splitlines()}
    reasons: Any = quarantine.summary()["kinds"]
    return Found(bad, named, good, used, reasons, round(slowest, 2), round((_most_memory() - before) / 1e3, 1))


def _words(name: str, place: Path) -> Iterable[str]:
    """What a recipe needs besides data."""
    if name != "text":
        return ()
    train(Path(random.__file__).read_text("utf-8").splitlines(), "bpe", VOCABULARY, place / "tokenizer")
    sizes = f"model.vocab_size={VOCABULARY}", f"model.mask_token_id={VOCABULARY - 1}"
    return *sizes, f"views.tokenizer={place / 'tokenizer'}"


def _most_memory() -> int:
    """Kilobytes that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Read the words, print what was found."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=given.get("folder")) as place:
        sizes = (int(given.get(name, default)) for name, default in (("count", 200), ("good", 32), ("seed", 0)))
        found = read(Path(place), given["modality"], *sizes)
    wrong = {"unnamed": sorted(found.bad - found.named), "wrongly named": sorted(found.named - found.bad)}
    told = {"malformed": len(found.bad), "named": len(found.bad & found.named), "good": found.good, "used": found.used, **wrong}
    told |= {"reasons": found.reasons, "slowest": found.slowest, "megabytes": found.megabytes}
    print(json.dumps(told))
    sys.exit(not found.sound)


if __name__ == "__main__":
    main()
