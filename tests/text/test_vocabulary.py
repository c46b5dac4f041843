import os
import random
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece

from modalities.text.tokenizer import SPACES, begin_id, encode, end_id, load, stretches, train

ODD = [
    "",
    " ",
    "\n\t\u00a0 \u3000",
    " both  ends\t\n",
    "na\u00efve caf\u00e9, cafe\u0301 \u2014 \u201cquoted\u201d",
    "\u4e16\u754c\U0001f600\U0001f600 \u0645\u0631\u062d\u0628\u0627 unknown\U0001f600known",
    "\u2581lower \u2581\u2581 block\u2581",
    "a\u200bb\ufeffc\u0301 \x1d x\u2028y",
    "x <s> y </s><pad> <mask><unk> z<mask>",
]


def varied(seed, count):
    """Texts of characters and words that a tokenizer may stumble over."""
    draw = random.Random(seed)
    words = [
        *"ab.,<>/\u00e9\u4e16",
        "def ",
        "self",
        "\u0301",
        "ing",
        "\n",
        " ",
        "  ",
        "\u00a0",
        "\u2581",
        "0",
        "<s",
        "mask>",
        "\U0001f600",
    ]
    for _ in range(count):
        yield "".join(draw.choice(words) for _ in range(draw.randint(1, 40)))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_those_of_sentencepiece(trained_tokenizers, corpus, kind):
    own = sentencepiece.SentencePieceProcessor(model_file=str(trained_tokenizers[kind] / "sentencepiece.model"))
    fast = load(trained_tokenizers[kind])
    texts = [*ODD, *corpus, *varied(0, 500)]
    if kind == "unigram":  # equally likely ways to cut a run are told apart by rounding
        texts = [re.sub(r"([^\s])\1{2,}", r"\1", text) for text in texts]
    found = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, found):
        assert ids == own.encode(text), text
        assert fast.decode(ids, skip_special_tokens=False) == own.decode(ids).replace("\u2047", "<unk>").replace(
            " <unk> ", "<unk>"
        )
    assert sum(fast.unk_token_id in ids for ids in found) > 20


def test_a_run_is_cut_as_well_as_sentencepiece_does(trained_tokenizers):
    own = sentencepiece.SentencePieceProcessor(model_file=str(trained_tokenizers["unigram"] / "sentencepiece.model"))
    for text in ("-" * 23, "=" * 100, "a" * 31):
        (ids,) = encode(load(trained_tokenizers["unigram"]), [text])
        score = [sum(own.get_score(i) for i in way) for way in (ids.tolist(), own.encode(text))]
        assert score[0] == pytest.approx(score[1], rel=1e-6)


def test_a_fresh_process_loads_them_with_transformers_alone(trained_tokenizers):
    text = "Return the <mask> of  self.\n"
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "for folder in sys.argv[2:]:\n"
        "    t = AutoTokenizer.from_pretrained(folder)\n"
        "    print(*t(sys.argv[1])['input_ids'], len(t), t.mask_token_id, t.padding_side, *t(sys.argv[1], 'x')['input_ids'])\n"
        "assert not {'mmssl', 'modalities'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, text, *map(str, trained_tokenizers.values())],
        capture_output=True,
        text=True,
        cwd=trained_tokenizers["bpe"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    for folder, line in zip(trained_tokenizers.values(), done.stdout.splitlines(), strict=True):
        before, after, pair = encode(load(folder), ["Return the", " of self.", "x"])
        once = [0, *before, 999, *after, 2]
        assert line.split() == [*map(str, once), "1000", "999", "right", *map(str, [*once, 2, *pair, 2])]


def test_special_tokens_have_the_usual_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 999]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (begin_id(tokenizer), tokenizer.pad_token_id, end_id(tokenizer), tokenizer.mask_token_id) == (0, 1, 2, 999)
    assert len(tokenizer) == len({*tokenizer.get_vocab().values()}) == 1000


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_text_yields_no_special_token(trained_tokenizers, kind):
    fast = load(trained_tokenizers[kind])
    for name in ("<s>", "<pad>", "</s>", "<mask>"):
        for text in (name, f"x{name}", f"<{name}>", f"{name}{name} \u00a0{name}y"):
            (ids,) = encode(fast, [text])
            assert not {0, 1, 2, 999} & {*ids}
            assert fast.decode(ids) == " ".join(text.split())


def test_a_foreign_unigram_vocabulary_yields_no_special_token_either():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("<mask>", 0.0)]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocabulary, unk_id=3)), **names)
    assert foreign("a<mask>a", add_special_tokens=False, split_special_tokens=True)["input_ids"] == [4, 5, 4]
    assert encode(foreign, ["a<mask>a", ""])[0].tolist() == [4, 4]


def test_training_repeats(trained_tokenizers, corpus, tmp_path):
    train(iter(corpus), "unigram", 1000, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "sentencepiece.model"):
        assert (tmp_path / "again" / name).read_bytes() == (trained_tokenizers["unigram"] / name).read_bytes()


def test_long_documents_are_learned_from_whole(tmp_path):
    words = " ".join(["lorem ipsum"] * 500 + ["zygote quartz"] * 500)  # 12 kB in one line
    train([words], "bpe", 40, tmp_path)
    assert "zygote" in load(tmp_path).decode(encode(load(tmp_path), ["zygote"])[0])
    assert len(encode(load(tmp_path), ["quartz"])[0]) <= 2


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_largest_size_that_is_named_is_possible(kind, tmp_path):
    texts = ["the cat sat on the mat", "a dog sat"]
    with pytest.raises(ValueError, match=r"vocab: 5000 is more than the texts support; at most \d+") as error:
        train(texts, kind, 5000, tmp_path)
    most = int(re.findall(r"\d+", str(error.value))[-1])
    with pytest.raises(ValueError, match=f"at most {most} are"):
        train(texts, kind, most + 1, tmp_path)
    assert not any(tmp_path.iterdir())
    train(texts, kind, most, tmp_path)
    assert len(load(tmp_path)) == most
    with pytest.raises(ValueError, match=r"too small for the characters of the texts; at least \d+") as error:
        train(texts, kind, 8, tmp_path)
    least = int(re.findall(r"\d+", str(error.value))[-1])
    train(texts, kind, least, tmp_path)
    assert len(load(tmp_path)) == least


@pytest.mark.parametrize("vocab", [6, 0, -1])
def test_a_size_without_room_for_text(vocab, tmp_path):
    with pytest.raises(ValueError, match="must be at least 7"):
        train(["text"], "bpe", vocab, tmp_path)


@pytest.mark.parametrize("texts", [[], [" \n"]])
def test_nothing_to_learn_from(texts, tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train(texts, "unigram", 100, tmp_path)


def test_what_the_texts_raise_comes_out_as_it_is(tmp_path):
    def texts():
        yield "a first text"
        raise KeyError("second")

    with pytest.raises(KeyError, match="second"):
        train(texts(), "unigram", 100, tmp_path)


def test_loading_says_what_is_missing(tmp_path, trained_tokenizers, monkeypatch):
    with pytest.raises(ValueError, match=rf"no folder {tmp_path}/none; train one with `mmssl tokenizer train .*out={tmp_path}"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no folder \./none"):
        load("./none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer: .*empty cannot be loaded \(.*; train one with"):
        load(tmp_path / "empty")

    def offline(*_, **__):
        raise OSError("cannot reach\nthe Hub")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(
        ValueError, match=r"tokenizer: org/name is no folder here and cannot be loaded \(cannot reach the Hub\)"
    ):
        load("org/name")


def test_special_tokens_that_are_missing_are_named(trained_tokenizers, tmp_path):
    fast = load(trained_tokenizers["bpe"])
    fast.mask_token = None
    fast.save_pretrained(tmp_path / "maskless")
    assert load(tmp_path / "maskless").mask_token_id is None
    fast.pad_token = fast.bos_token = None
    fast.save_pretrained(tmp_path / "two")  # the beginning is still there as cls
    with pytest.raises(ValueError, match="has no token for pad; train"):
        load(tmp_path / "two")
    fast.cls_token = fast.eos_token = fast.sep_token = None
    fast.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no token for pad, bos or cls, eos or sep; train"):
        load(tmp_path / "none")


def test_stretches_lose_nothing_and_cut_before_white_space():
    draw = random.Random(1)
    for most in (1, 2, 7, 40):
        text = "".join(draw.choice("abc  \n") for _ in range(200)) + "x" * 100
        pieces = [*stretches(text, most)]
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= most for piece in pieces)
        for before, after in pairwise(pieces):
            assert after[0] in " \n" or not re.search(r".[ \n]", before, re.DOTALL)
    assert [*stretches("", 5)] == [""]


def test_stretches_do_not_change_the_ids(tokenizer, corpus):
    text = "\n\n".join(corpus[:60])
    (whole,) = encode(tokenizer, [text])
    np.testing.assert_array_equal(np.concatenate(encode(tokenizer, [*stretches(text, 200)])), whole)


def test_every_white_space_is_one():
    assert {" ", "\t", "\n", "\u00a0", "\u3000", "\u2581"} <= {*SPACES}
    assert all(space.isspace() or space == "\u2581" for space in SPACES)
