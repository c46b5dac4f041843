"""features of a data set as parquet, npy or safetensors: mmssl embed MODEL data=... out=FILE

Row i is sample i: that of a sample that cannot be read is empty (parquet) or NaN, and the sample is named in
FILE.quarantine.jsonl. A parquet has columns row, name, label, class and embedding; beside the others FILE.rows.csv says the
same. What was interrupted goes on where it stopped, on any number of processes: accelerate launch -m mmssl embed MODEL ...
tokens are pooled (as the model pools, and as probes measure), mean (of content), cls, patch (all tokens of content), or
layer:K (mean of content after block K; layer:-1 is the last).
"""

from __future__ import annotations

import json

from mmssl.cli.options import parse

OPTIONS = {
    "data": (str, ..., "folder, table or Hub id"),
    "out": (str, ..., "file that ends in .parquet, .npy or .safetensors"),
    "tokens": (str, "pooled", "pooled, mean, cls, patch or layer:K"),
    "dtype": (("float32", "float16"), "float32", "of the numbers written"),
    "split": (str, "train", "of the data"),
    "samples": (int, None, "only so many, spread evenly"),
    "shard": (int, 2048, "samples that are written at once"),
    "workers": (int, 2, "processes that decode"),
    "column": (str, None, "column of the data, found by name if unset"),
    "label": (str, None, "column of the labels, found by name if unset"),
    "root": (str, None, "folder that names in a table are relative to"),
    "member": (str, None, "whose encoder, of a model of several kinds of data"),
    "modality": (str, None, "kind of data, found by the model's input if unset"),
    "json": (bool, False, "print JSON"),
}


def run(arguments: list[str]) -> int:
    """`mmssl embed MODEL data=... out=...`."""
    given = parse(arguments, ("MODEL",), OPTIONS)
    as_json = given.pop("json")
    import os
    from pathlib import Path

    from mmssl.evaluate.embedding import embed

    given = {name: value for name, value in given.items() if value is not None}
    out = embed(given.pop("model"), given.pop("data"), **given)
    assert isinstance(out, Path)
    if os.environ.get("RANK", "0") == "0":
        ledger = Path(f"{out}.quarantine.jsonl")
        bad = len(ledger.read_text("utf-8").splitlines()) if ledger.exists() else 0
        named = f"; {bad} samples could not be read, see {ledger}" if bad else ""
        print(json.dumps({"out": str(out), "unreadable": bad}) if as_json else f"{out}{named}")
    return 0
