import sysconfig
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from modalities.text import TextViews
from modalities.text.tokenizer import load, train


@pytest.fixture(autouse=True)
def cached_here(tmp_path, monkeypatch):
    """Blocks go to a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def corpus():
    """A list of texts: pieces of Python's own source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [part for name in ("argparse", "statistics") for part in (root / f"{name}.py").read_text().split("\n\n")]


@pytest.fixture(scope="session")
def trained_tokenizers(tmp_path_factory, corpus):
    """kind -> folder of a tokenizer with 1000 tokens."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("unigram", "bpe")}
    for kind, folder in folders.items():
        train(corpus, kind, 1000, folder)
    return folders


@pytest.fixture(scope="session")
def tokenizer(trained_tokenizers):
    return load(trained_tokenizers["unigram"])


@pytest.fixture
def views(trained_tokenizers):
    """Function: TextViews with `max_tokens` 16 unless told."""

    def build(max_tokens=16, vocab_size=1000, pad_token_id=1, name=str(trained_tokenizers["unigram"]), **options):
        shape = SimpleNamespace(max_tokens=max_tokens, vocab_size=vocab_size, pad_token_id=pad_token_id, mask_id=None)
        return TextViews(shape, name, **options)

    return build
