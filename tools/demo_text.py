"""Text for the demonstration: `text(FOLDER)` writes the prose of Python itself, by what it is about. No network."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Modules and packages of the standard library by what they are for; those that a Python does not have are left out.
AREAS = {
    "concurrency": "asyncio concurrent contextlib.py contextvars.py multiprocessing queue.py sched.py selectors.py signal.py "
    "subprocess.py threading.py",
    "data": "array.py bisect.py collections configparser.py copy.py copyreg.py csv.py dbm difflib.py gettext.py heapq.py html "
    "json locale.py pickle.py pickletools.py plistlib.py re shelve.py sqlite3 string.py struct.py textwrap.py xml",
    "files": "_pyio.py bz2.py filecmp.py fileinput.py fnmatch.py genericpath.py glob.py gzip.py io.py linecache.py lzma.py "
    "mailbox.py mimetypes.py netrc.py ntpath.py os.py pathlib pathlib.py posixpath.py shutil.py stat.py tarfile.py tempfile.py "
    "zipapp.py zipfile zipfile.py zipimport.py",
    "network": "asynchat.py asyncore.py cgi.py email ftplib.py http imaplib.py ipaddress.py nntplib.py poplib.py smtpd.py "
    "smtplib.py socket.py socketserver.py ssl.py telnetlib.py urllib wsgiref xmlrpc",
    "numbers": "_pydatetime.py _pydecimal.py _pylong.py calendar.py colorsys.py datetime.py fractions.py numbers.py "
    "random.py statistics.py zoneinfo",
    "tools": "argparse.py ast.py bdb.py cProfile.py cmd.py code.py codeop.py compileall.py dis.py doctest.py inspect.py "
    "logging modulefinder.py optparse.py pdb.py profile.py pstats.py pyclbr.py pydoc.py tokenize.py trace.py traceback.py "
    "unittest venv warnings.py",
}
LENGTH, SHARE = 250, 0.25  # characters of a sample at least, share of the test


def text(folder: Path) -> None:
    """Write FOLDER/text/{train,test}/{class}/*.txt: docstrings by area, and topics of the language reference.

    No module or topic, and no paragraph, occurs in both splits.
    """
    areas = {name: dict(_modules(words.split())) for name, words in AREAS.items()} | {"language": _topics()}
    held_out = {name: _held_out(documents) for name, documents in areas.items()}
    seen: set[str] = set()
    for split in ("train", "test"):
        for name, documents in areas.items():
            chosen = {key: words for key, words in documents.items() if (key in held_out[name]) == (split == "test")}
            for key, words in chosen.items():
                for i, sample in enumerate(_samples(words, seen)):
                    place = Path(folder) / "text" / split / name / f"{key}-{i:03}.txt"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_text(sample, encoding="utf-8")


def _modules(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(module, paragraphs of its docstrings); read, not imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for place in (root / name for name in names):
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            name = ".".join(file.relative_to(root).with_suffix("").parts)
            if not {"test", "tests", "_test"} & {*name.split(".")}:
                yield name, [paragraph for words in _docstrings(file) for paragraph in _paragraphs(words)]


def _docstrings(file: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, kinds):
            yield ast.get_docstring(node) or ""


def _topics() -> dict[str, list[str]]:
    """Topic -> paragraphs; a few Pythons come without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: _paragraphs(topics[name]) for name in sorted(topics)}


def _paragraphs(words: str) -> list[str]:
    """Those that are prose: no headings, tables, sessions or code."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", words) if not re.search(r"^\s*([*=~^-])\1{3}", part, re.M))
    return [p for p in found if len(p) >= 60 and ">>>" not in p and sum(c.isalpha() or c == " " for c in p) > 0.85 * len(p)]


def _held_out(documents: dict[str, list[str]]) -> set[str]:
    """Documents of the test: in an order that their names decide, as many as make up its share."""
    size = {name: sum(map(len, words)) for name, words in documents.items()}
    room, chosen = SHARE * sum(size.values()), set()
    for name in sorted(documents, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        if size[name] <= room:
            chosen.add(name)
            room -= size[name]
    return chosen


def _samples(paragraphs: list[str], seen: set[str]) -> Iterator[str]:
    """Paragraphs that were not seen before, joined until they are long enough."""
    sample = ""
    for paragraph in paragraphs:
        if paragraph not in seen:
            seen.add(paragraph)
            sample += paragraph + "\n\n"
        if len(sample) >= LENGTH:
            yield sample.strip() + "\n"
            sample = ""
    if len(sample) >= LENGTH // 4:
        yield sample.strip() + "\n"
