"""a published data2vec checkpoint as a model folder: mmssl convert CHECKPOINT to=FOLDER

CHECKPOINT is a file of data2vec 2.0 or data2vec 1 for images, speech or text, as its authors have published it for fairseq (or
for BEiT's code, data2vec 1 for images). FOLDER loads with AutoModel, is probed by `mmssl probe FOLDER data=...` and gone on
from by `mmssl pretrain model.init=FOLDER data=...`; data2vec 1 becomes the class of transformers. The head of a fine-tuned
model is left out. Nothing that the file names is executed.

A text model gets the tokenizer of its release with dictionary=dict.txt vocab=encoder.json merges=vocab.bpe.
"""

from __future__ import annotations

from pathlib import Path

from mmssl.cli.options import parse

FILES = {
    "dictionary": (Path, None, "text: fairseq's dictionary of the release, dict.txt"),
    "vocab": (Path, None, "text: GPT-2's pieces, encoder.json"),
    "merges": (Path, None, "text: GPT-2's byte pairs, vocab.bpe"),
}
OPTIONS = {
    "to": (Path, ..., "folder to write"),
    "which": (("student", "teacher"), None, "network to write; the teacher, where the file has one, if unset"),
    **FILES,
}


def run(arguments: list[str]) -> int:
    """`mmssl convert CHECKPOINT`."""
    given = parse(arguments, ("CHECKPOINT",), OPTIONS)
    from mmssl.hub.convert import convert

    files = {name: given[name] for name in FILES if given[name] is not None}
    folder, notes = convert(given["checkpoint"], given["to"], given["which"], files)
    print("\n".join([*notes, str(folder)]))
    return 0
