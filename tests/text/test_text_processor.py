from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

from modalities.text.processor import plain_views, processor

SIZE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 1000}


def test_the_tokenizer_is_exported_with_the_models_length(views, tmp_path):
    own = views(max_tokens=24, pack=True)
    processor(SimpleNamespace(), own).save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.model_max_length == 24
    assert own.tokenizer.model_max_length > 24  # the original is left alone
    text = "the value of an argument " * 9
    assert saved(text, truncation=True)["input_ids"] == own.plain([text]).x[0].tolist()


def test_views_of_our_own_models(trained_tokenizers):
    path = trained_tokenizers["unigram"]
    model = SimpleNamespace(config=SimpleNamespace(model_type="mmssl", vocab_size=1000, max_tokens=24))
    own = plain_views(model, path)
    assert (own.max_tokens, own.pack, own.pad_id) == (24, False, 1)
    assert own.plain(["word " * 99]).x.shape == (1, 24)


@pytest.mark.parametrize(
    ("kind", "config", "length"), [(BertModel, BertConfig, 40), (RobertaModel, RobertaConfig, 40 - 2)]
)  # fmt: skip
def test_the_longest_text_fills_the_position_table_of_others(trained_tokenizers, kind, config, length):
    model = kind(config(max_position_embeddings=40, pad_token_id=1, **SIZE)).eval()
    found = plain_views(model, trained_tokenizers["bpe"])
    x = found.plain(["word " * 99]).x
    assert x.shape == (1, length)
    with torch.no_grad():
        model(x)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, length + 1), 9))


def test_a_tokenizer_may_know_less_than_the_position_table(trained_tokenizers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained_tokenizers["bpe"])
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(tmp_path)
    assert plain_views(BertModel(BertConfig(max_position_embeddings=40, **SIZE)), tmp_path).max_tokens == 20


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: .* cannot be loaded"):
        plain_views(SimpleNamespace(config=SimpleNamespace(model_type="mmssl")), tmp_path)
