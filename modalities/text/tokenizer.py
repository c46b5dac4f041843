"""Tokenizers: any of Hugging Face, and new ones trained with sentencepiece."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

BEGIN, PAD, END, UNKNOWN, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"  # ids 0 to 3, and the last
TRAIN = "train one with `mmssl tokenizer train data=... out={}`, or name a Hugging Face tokenizer"
SPACES = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()] + ["\u2581"]  # the last stands for a space in pieces
SENTENCE = 1000  # characters, of at most 4 bytes: sentencepiece passes over what is longer than 4192 bytes
SENTENCES = 2_000_000  # that it learns from at most, drawn evenly


def load(path: str | Path) -> Any:
    """A tokenizer of transformers.

    Args:
        path: folder or Hub id.
    Raises: ValueError if it cannot be loaded, or lacks a token for padding, for the beginning or for the end of a text.
    """
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith((".", "~"))):
        raise ValueError(f"tokenizer: there is no folder {path}; {TRAIN.format(path)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder if folder.exists() else path), trust_remote_code=False)
    except Exception as error:  # the readers of the many kinds of files raise almost anything
        place = "" if folder.exists() else " is no folder here and"
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer: {path}{place} cannot be loaded ({reason}); {TRAIN.format('FOLDER')}") from None
    needed = {"pad": tokenizer.pad_token_id, "bos or cls": begin_id(tokenizer), "eos or sep": end_id(tokenizer)}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"tokenizer: {path} has no token for {', '.join(missing)}; {TRAIN.format('FOLDER')}")
    return tokenizer


def begin_id(tokenizer: Any) -> int:
    """The token that opens every text."""
    return tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def end_id(tokenizer: Any) -> int:
    """The token that closes every text."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, (n,) int64, without beginning and end.

    A text that holds the characters of a special token, `<mask>` for example, does not yield that token.
    """
    found = tokenizer(
        [*texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # of texts longer than the model's positions
    )
    # Unigram models find the names of special tokens among their pieces all the same.
    special = [tokenizer.pad_token_id, begin_id(tokenizer), end_id(tokenizer), tokenizer.mask_token_id]
    special = [i for i in special if i is not None]
    rows = (np.asarray(ids, np.int64) for ids in found["input_ids"])
    return [ids[~np.isin(ids, special)] for ids in rows]


def stretches(text: str, most: int) -> Iterator[str]:
    """The text in pieces of at most `most` characters, cut before white space where there is any."""
    start = 0
    while len(text) - start > most:
        end = max(text.rfind(" ", start + 1, start + most), text.rfind("\n", start + 1, start + most))
        end = start + most if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def train(texts: Iterable[str], kind: Literal["unigram", "bpe"], vocab: int, folder: str | Path) -> None:
    """Learn a vocabulary, the same for the same texts, and write it as a tokenizer that AutoTokenizer loads.

    Runs of white space become one space, nothing else is rewritten. What is rarer than one character in 2000 is unknown.
    `sentencepiece.model` beside the tokenizer is the same vocabulary for sentencepiece; both give the same ids, except where
    a unigram model finds ways to cut a run of one character that are equally likely.

    Args:
        vocab: size with the five special tokens.
        folder: made if need be.
    Raises: ValueError if the texts do not support the size, with the sizes that they do.
    """
    import sentencepiece

    model = _append(_learn(texts, kind, vocab - 1), MASK)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)  # type: ignore[call-arg]
    tokenizer = _fast(pieces, kind)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    (Path(folder) / "sentencepiece.model").write_bytes(model)


def from_fairseq(dictionary: Path, vocab: Path, merges: Path, size: int, longest: int) -> tuple[Any, str]:
    """The tokenizer of a model of fairseq, of RoBERTa's kind and with the ids of that model.

    Args:
        dictionary: of fairseq, a line for each id after the first four: GPT-2's id of a piece, or a filler, and its count.
        vocab, merges: GPT-2's pieces with their ids as JSON, and its byte pairs.
        size: rows of the model's table, the last of which is for `<mask>`.
        longest: tokens that the model takes.
    Returns: the tokenizer; a sentence on pieces that the dictionary lacks, or "".
    Raises: ValueError that begins with the option whose file is wrong.
    """
    from transformers import RobertaTokenizer

    entries = [line.rpartition(" ")[0] or line for line in _lines("dictionary", dictionary) if line.strip()]
    if len(entries) + 5 != size:
        raise ValueError(
            f"dictionary: {dictionary} has {len(entries)} entries, the model has rows for {size - 5} and five others"
        )
    try:
        pieces = {str(number): piece for piece, number in json.loads("\n".join(_lines("vocab", vocab))).items()}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"vocab: {vocab} is no JSON of pieces and their ids, such as GPT-2's encoder.json") from None
    names = [BEGIN, PAD, END, UNKNOWN, *(pieces.get(entry, entry) for entry in entries), MASK]
    ids = {name: i for i, name in enumerate(names)}
    if len(ids) != size:
        raise ValueError(f"dictionary: {dictionary} has {size - len(ids)} entries twice")
    pairs = [tuple(line.split()) for line in _lines("merges", merges) if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"merges: {merges} has lines that are no pair, such as GPT-2's vocab.bpe has")
    known = [pair for pair in pairs if {*pair, "".join(pair)} <= ids.keys()]
    tokenizer = RobertaTokenizer(vocab=ids, merges=known, model_max_length=longest)  # type: ignore[arg-type]
    lost = len(pairs) - len(known)
    return tokenizer, f"{lost} of {len(pairs)} byte pairs are left out, since the dictionary lacks them." if lost else ""


def _lines(option: str, path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: {path} cannot be read ({error})") from None


def _learn(texts: Iterable[str], kind: str, size: int) -> bytes:
    """A model of sentencepiece without a mask token."""
    import sentencepiece

    if size < 6:
        raise ValueError(f"vocab: {size + 1}, must be at least 7, of which five are special tokens")
    failed: list[BaseException] = []

    def sentences() -> Iterator[str]:
        try:
            for text in texts:
                yield from stretches(" ".join(text.split()), SENTENCE)
        except BaseException as error:  # sentencepiece turns it into one of its own
            failed.append(error)
            raise

    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "rules.tsv"
        rules.write_text("".join(f"{ord(space):X}\t20\n" for space in SPACES if space != " "))
        sentencepiece.set_random_generator_seed(0)
        try:
            sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
                sentence_iterator=sentences(),
                model_writer=model,
                model_type=kind,
                vocab_size=size,
                input_sentence_size=SENTENCES,
                normalization_rule_tsv=str(rules),
                bos_id=0,
                pad_id=1,
                eos_id=2,
                unk_id=3,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise failed[0] if failed else _explained(error, size + 1) from None
    # The model quotes the path, which differs each time; a name of the same length leaves the encoding intact.
    path = str(rules).encode()
    return model.getvalue().replace(path, b"rules.tsv".rjust(len(path), b"_"))


def _explained(error: RuntimeError, vocab: int) -> Exception:
    """What sentencepiece says about sizes, which do not count the mask token, in our words."""
    text = str(error)
    if most := re.search(r"set it to a value <= (\d+)", text):
        return ValueError(f"vocab: {vocab} is more than the texts support; at most {int(most[1]) + 1} are possible")
    if least := re.search(r"smaller than required_chars. \d+ vs (\d+)", text):
        return ValueError(f"vocab: {vocab} is too small for the characters of the texts; at least {int(least[1]) + 1}")
    if "sentences_.empty()" in text:
        return ValueError("data: there is no text to learn from")
    return error


def _append(model: bytes, piece: str) -> bytes:
    """The model with one more control symbol at its end; concatenating protocol buffers appends to their repeated fields."""
    name = piece.encode()
    body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", 0) + b"\x18\x03"  # piece, score, type: control
    return model + b"\x0a" + bytes([len(body)]) + body


def _fast(model: Any, kind: str) -> Any:
    """The tokenizer of transformers for a model of sentencepiece."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    if kind == "unigram":
        fast = Tokenizer(models.Unigram(pieces, unk_id=3))
        # Special tokens are pieces too, and the best ones. Text that looks like one is cut after its first character.
        names = "|".join(name.strip("<>") for name in (BEGIN, PAD, END, UNKNOWN, MASK))
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.Split(Regex(f"<(?=(?:{names})>)"), "merged_with_previous")]
        )
    else:
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        cuts = ((piece[:at], piece[at:]) for piece in [*vocabulary][4:-1] for at in range(len(piece) - 1, 0, -1))
        merges = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]  # best first
        fast = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True))
        fast.pre_tokenizer = words
    spaces = Regex("[" + "".join(f"\\x{{{ord(space):x}}}" for space in SPACES) + "]+")
    fast.normalizer = normalizers.Sequence([normalizers.Replace(spaces, " "), normalizers.Strip(left=False, right=True)])
    fast.decoder = decoders.Metaspace(prepend_scheme="first")
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} {END} $B {END}", special_tokens=[(BEGIN, 0), (END, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=BEGIN,
        eos_token=END,
        cls_token=BEGIN,
        sep_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        mask_token=AddedToken(MASK, lstrip=True, normalized=False, special=True),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
