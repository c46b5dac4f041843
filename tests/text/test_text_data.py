import gzip
import os
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer

from mmssl.config import DataOptions
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import open_source
from mmssl.types import Rejected
from modalities.text import MODALITY
from modalities.text.data import decode, prepare, raw
from modalities.text.tokenizer import encode

DOCUMENTS = [
    "return self",
    "the value of an argument is a string",
    "x",
    "import os\n\nimport sys",
    "a name of the parser",
] * 4 + ["end"]


def source_of(path, **options):
    return open_source(DataOptions(path=str(path), modality="text", **options), MODALITY, "train")


@pytest.fixture
def quarantine():
    return Quarantine(None, 0.5, 3)


@pytest.fixture
def table(tmp_path):
    """Function: documents -> source of a parquet table, with labels 0 and 1 in turn."""

    def build(documents=DOCUMENTS, name="train", **options):
        rows = {"text": documents, "label": [i % 2 for i in range(len(documents))]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
        return source_of(tmp_path / f"{name}.parquet", **options)

    return build


def blocks(source):
    return [decode(source.value(i)).tolist() for i in range(source.size)]


# Decoding -----------------------------------------------------------------------------------------------------------


def test_documents_are_files_or_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffcafé\r\n".encode())
    assert decode(str(path)) == decode(path) == decode(path.read_bytes()) == "café\r\n"
    ids = decode([5, 6, 7])
    assert ids.dtype == np.int64
    assert decode(ids).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        (b"caf\xe9", "bad_text", "byte 3 is not UTF-8"),
        ("\ufeffé".encode() + b"\xff", "bad_text", "byte 5 is not UTF-8"),
        ("text".encode("utf-16"), "bad_text", "byte 0 is not UTF-8"),
        (gzip.compress(b"text", mtime=0), "bad_text", "byte 1 is not UTF-8"),
        ("\ufeffé\0".encode(), "bad_text", "byte 5 is NUL"),
        (b"", "empty", "no text"),
        ("\ufeff".encode(), "empty", "no text"),
        ("\u00a0\n\t".encode(), "empty", "white space"),
        ("no/such/file.txt", "unreadable", "no such file"),
        (3, "wrong_type", "int"),
    ],
)
def test_what_is_no_text_is_rejected(value, kind, reason):
    with pytest.raises(Rejected) as error:
        decode(value)
    assert error.value.kind == kind
    assert reason in error.value.reason


def test_a_file_without_permission_is_rejected(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(Rejected, match="unreadable: Permission denied"):
        decode(str(tmp_path / "a.txt"))


def test_raw_words_are_compared_as_bags():
    texts = ["the cat sat on the mat", "mat the on cat the sat!", "The cat sat", "entirely different words"]
    hashed = torch.stack([raw(text) for text in texts])
    assert hashed.shape == (4, 4096)
    counts = torch.from_numpy(CountVectorizer().fit_transform(texts).toarray()).double()
    counts = counts / counts.norm(dim=1, keepdim=True)
    torch.testing.assert_close(hashed.double() @ hashed.double().T, counts @ counts.T, atol=1e-6, rtol=0)  # no collision here


# Packing ------------------------------------------------------------------------------------------------------------


def test_packing_is_one_stream_of_tokens_cut_evenly(table, views, tokenizer, quarantine):
    stream = []
    for document in DOCUMENTS:
        stream += [*tokenizer(document, add_special_tokens=False)["input_ids"], 2]
    expected = [stream[i : i + 15] for i in range(0, len(stream) - 14, 15)]
    assert len(stream) % 15  # the rest is left out
    source = table()
    packed = prepare(source, views(pack=True), quarantine)
    assert blocks(packed) == expected
    assert (packed.size, packed.total, packed.column, packed.names) == (len(expected), len(expected), "ids", False)
    assert (packed.labels, packed.label, packed.classes, packed.lengths) == (None, None, 0, None)
    assert packed.label_at(2) == -1
    assert packed.identity(3) == f"{source.facts['path']} packed row 3"
    assert packed.facts == source.facts | {"blocks": len(expected), "tokens": 15 * len(expected)}
    assert quarantine.totals() == (0, len(DOCUMENTS))
    assert source.column == "text"


def test_a_block_that_is_short_stays_if_there_is_no_other(table, views, tokenizer, quarantine):
    packed = prepare(table(["return self", "x"]), views(max_tokens=512, pack=True), quarantine)
    first, second = tokenizer(["return self", "x"], add_special_tokens=False)["input_ids"]
    assert blocks(packed) == [[*first, 2, *second, 2]]


@pytest.mark.parametrize("pack", [True, False])
def test_batches_and_cuts_do_not_show(table, views, quarantine, corpus, monkeypatch, pack):
    documents = corpus[:80]
    whole = blocks(prepare(table(documents, "a"), views(pack=pack), quarantine))
    monkeypatch.setattr("modalities.text.data.STRETCH", 50)
    monkeypatch.setattr("modalities.text.data.BATCH", 120)
    assert blocks(prepare(table([*documents, "x"], "b"), views(pack=pack), quarantine))[: len(whole)] == whole


def test_documents_are_cut_evenly_and_never_joined(table, views, tokenizer, quarantine):
    documents = ["x", "one two", *("word " * n for n in (13, 14, 15, 28, 29, 100))]
    cut = prepare(table(documents), views(pack=False), quarantine)
    expected, labels = [], []
    for number, document in enumerate(documents):
        (ids,) = encode(tokenizer, [document])
        pieces = -(-len(ids) // 14)
        for i in range(pieces):  # the first ones are a token longer if need be
            small, more = divmod(len(ids), pieces)
            start = i * small + min(i, more)
            expected.append([0, *ids[start : start + small + (i < more)], 2])
            labels.append(number % 2)
    assert blocks(cut) == expected
    assert cut.lengths.tolist() == [len(ids) for ids in expected]
    assert cut.lengths.dtype == torch.int64
    assert max(cut.lengths) == 16
    assert cut.labels.tolist() == labels
    assert (cut.classes, cut.label) == (2, "label")
    assert cut.facts["tokens"] == sum(map(len, expected))


def test_bad_documents_are_left_out_and_recorded_each_time(tmp_path, views, quarantine):
    for name, content in {"a.txt": b"good text", "b.txt": b"caf\xe9", "c.md": b" ", "d.txt": "\u200b".encode()}.items():
        (tmp_path / name).write_bytes(content)
    source = source_of(tmp_path)
    for times in (1, 2):  # the second one from the cache
        cut = prepare(source, views(pack=False), quarantine)
        assert cut.size == 2  # a zero-width space is an unknown token, not nothing
        found = quarantine.summary()
        assert (found["bad"], found["seen"], found["kinds"]) == (2 * times, 4 * times, {"empty": times, "bad_text": times})
    assert found["first"][0] == f"{tmp_path}/b.txt (bad_text: byte 3 is not UTF-8; convert the file to UTF-8)"


def test_the_budget_of_bad_documents_is_over(table, views):
    strict = Quarantine(None, 0.0, 0)
    prepare(table(["good text", " "]), views(pack=False), strict)
    assert strict.over()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("documents", [[" ", "\n"], [" "]])
def test_nothing_left(table, views, quarantine, documents, pack):
    with pytest.raises(
        ValueError, match=r"data.path: .*parquet holds too little text: \d documents, of which \d cannot be used"
    ):
        prepare(table(documents), views(pack=pack), quarantine)


def test_one_token_is_no_block(table, views, quarantine):
    with pytest.raises(ValueError, match="0 cannot be used"):
        prepare(table(["x"]), views(pack=True), quarantine)


# The cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """Texts that are tokenised from here on."""
    seen = []

    def counted(tokenizer, texts):
        seen.extend(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr("modalities.text.data.encode", counted)
    return seen


def test_what_was_packed_once_is_found_again(table, views, quarantine, encoded):
    source = table()
    first = blocks(prepare(source, views(pack=True), quarantine))
    assert len(encoded) == len(DOCUMENTS)
    again = prepare(source_of(source.facts["path"]), views(pack=True), quarantine)
    assert (blocks(again), len(encoded)) == (first, len(DOCUMENTS))
    assert again.rows.cache_files  # mapped from the disk


def test_whatever_changes_the_blocks_is_a_new_entry(table, views, quarantine, encoded, trained_tokenizers):
    def packed(source, **options):
        del encoded[:]
        prepare(source, views(**options), quarantine)
        return bool(encoded)

    source = table()
    assert packed(source, pack=True)
    assert packed(source, pack=False)
    assert packed(source, pack=True, max_tokens=17)
    assert packed(source, pack=True, name=str(trained_tokenizers["bpe"]))
    assert packed(table(["other text", *DOCUMENTS[1:]], "other"), pack=True)
    assert packed(source_of(source.facts["path"], limit=7), pack=True)
    assert not packed(source, pack=True)


def test_a_tokenizer_that_changed_in_its_place_is_noticed(table, views, quarantine, encoded, tokenizer, tmp_path):
    folder = str(tmp_path / "tokenizer")
    tokenizer.save_pretrained(folder)
    prepare(table(), views(pack=True, name=folder), quarantine)
    more = type(tokenizer).from_pretrained(folder)
    more.add_tokens(["argument"])
    more.save_pretrained(folder)
    del encoded[:]
    prepare(table(), views(pack=True, name=folder, vocab_size=1001), quarantine)
    assert encoded


def test_a_file_that_changed_is_noticed(tmp_path, views, quarantine, encoded):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("first words")
    before = blocks(prepare(source_of(tmp_path), views(pack=True), quarantine))
    (tmp_path / "b.txt").write_text("other words")  # of the same length
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    assert blocks(prepare(source_of(tmp_path), views(pack=True), quarantine)) != before
    assert len(encoded) == 4


def test_what_fails_halfway_leaves_nothing_behind(table, views, quarantine, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    source = table()
    with monkeypatch.context() as patch:
        patch.setattr("modalities.text.data.encode", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(source, views(pack=True), quarantine)
    assert prepare(source, views(pack=True), quarantine).size


# Streams ------------------------------------------------------------------------------------------------------------


def test_streams_are_not_packed(table, views, quarantine):
    path = table().facts["path"]
    stream = source_of(path, streaming=True)
    assert prepare(stream, views(pack=False), quarantine) is stream
    with pytest.raises(ValueError, match=r"views.pack: .*set views.pack=false or data.streaming=false"):
        prepare(stream, views(pack=True), quarantine)


def test_the_tokenizer_is_checked_before_the_work(views):
    with pytest.raises(ValueError, match=r"model.vocab_size: 900, but .* has 1000 tokens"):
        prepare(SimpleNamespace(streaming=True), views(vocab_size=900), None)


@pytest.mark.realdata
def test_real_text_is_packed_as_if_tokenised_at_once(real_data, views, quarantine, tokenizer):
    path = real_data / "text" / "tinyshakespeare.txt"
    packed = prepare(source_of(path), views(max_tokens=512, pack=True), quarantine)
    (whole,) = encode(tokenizer, [path.read_text()])
    found = np.concatenate(blocks(packed))
    assert 0 <= len(whole) + 1 - len(found) < 511
    np.testing.assert_array_equal(found[: len(whole)], whole[: len(found)])
