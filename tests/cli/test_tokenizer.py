import datasets
import pytest

from mmssl.cli import main
from modalities.text.tokenizer import encode, load


@pytest.fixture(autouse=True)
def cached_here(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    for i in range(20):
        place = folder / ("train" if i < 15 else "test") / f"{i:02}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"The cat number {i} sat on the mat and said nothing at all." if i < 15 else "zebra " * 50)
    return folder


def call(capsys, *arguments):
    code = main(["tokenizer", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_training_writes_a_tokenizer_and_says_how_to_use_it(capsys, texts, tmp_path):
    out = tmp_path / "tokenizers" / "cats"
    code, told, _ = call(capsys, "train", f"data={texts}", f"out={out}", "vocab=36")
    assert code == 0
    assert told.splitlines()[-1] == f"wrote {out}; use it with: views.tokenizer={out}"
    tokenizer = load(out)
    assert len(tokenizer) == 36
    assert len(encode(tokenizer, ["sat on"])[0]) < 6
    assert tokenizer.unk_token_id in encode(tokenizer, ["zebra"])[0]  # of the test split
    assert (out / "sentencepiece.model").stat().st_size


def test_nothing_is_overwritten_unasked(capsys, texts, tmp_path):
    out = tmp_path / "out"
    words = ("train", f"data={texts}", f"out={out}", "split=test")
    assert call(capsys, *words, "vocab=12")[0] == 0
    code, _, err = call(capsys, *words, "vocab=13", "kind=bpe")
    assert (code, "is not empty" in err, "overwrite=true" in err) == (2, True, True)
    assert len(load(out)) == 12
    assert call(capsys, *words, "vocab=13", "kind=bpe", "overwrite=true")[0] == 0
    assert len(load(out)) == 13
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, "train", f"data={texts}", f"out={tmp_path / 'file'}")
    assert (code, "is a file" in err) == (2, True)


def test_a_column_of_a_table(capsys, tmp_path):
    rows = {"text": ["aaaa bbbb"] * 9, "other": ["some quite different words", *["words that differ"] * 8]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    words = ("train", f"data={tmp_path / 't.parquet'}", "vocab=26", "kind=bpe")
    assert call(capsys, *words, f"out={tmp_path / 'a'}", "column=other")[0] == 0
    assert 3 not in encode(load(tmp_path / "a"), ["different words"])[0]
    code, _, err = call(capsys, *words, f"out={tmp_path / 'b'}")
    assert (code, "vocab: 26 is more than the texts support; at most" in err) == (2, True)
    assert not (tmp_path / "b").exists()
    code, _, err = call(capsys, *words, f"out={tmp_path / 'b'}", "column=other", "limit=1")  # without `that`, `differ`
    assert code == 0
    assert 3 in encode(load(tmp_path / "b"), ["that"])[0]


def test_bad_texts_are_passed_over(capsys, texts, tmp_path):
    (texts / "train" / "00.txt").write_bytes(b"caf\xe9")
    (texts / "train" / "07.txt").write_bytes(b" ")
    code, told, _ = call(capsys, "train", f"data={texts}", f"out={tmp_path / 'out'}", "vocab=36")
    assert code == 0
    assert told.startswith(f"passed over 2 of 15 texts, the first is {texts}/train/00.txt (bad_text: byte 3 is not UTF-8")


def test_no_text_can_be_read(capsys, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff")
    code, _, err = call(capsys, "train", f"data={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    assert code == 3
    assert "no text can be read" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("train",), "data: missing"),
        (("trian", "data=x", "out=y"), "did you mean train?"),
        (("train", "data=./no/such", "out=y"), "data.path: ./no/such does not exist"),
        (("train", "data=x", "out=y", "kind=words"), "one of unigram, bpe"),
    ],
)
def test_mistakes(capsys, words, part):
    code, _, err = call(capsys, *words)
    assert code == 2
    assert part in err


def test_sizes_that_cannot_be(capsys, texts, tmp_path):
    words = ("train", f"data={texts}", f"out={tmp_path / 'out'}")
    for more, part in (("limit=0", "limit"), ("vocab=3", "at least 7"), ("vocab=10", "too small"), ("vocab=9000", "at most")):
        code, _, err = call(capsys, *words, more)
        assert (code, part in err) == (2, True), err
    assert not (tmp_path / "out").exists()
