"""The encoder with a head for a task, as transformers' Auto classes give it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import (
    CausalLMOutput,
    ImageClassifierOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from mmssl.model.backbone import Backbone
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel


def linear(config: Any) -> nn.Linear:
    """From the encoder's width to as many logits as there are classes."""
    return nn.Linear(config.hidden_size, config.num_labels)


class MmsslTask(PreTrainedModel):
    """An encoder of one kind of data under `mmssl`, and a head on top, which is the rest."""

    config_class = MmsslConfig
    config: MmsslConfig
    base_model_prefix = "mmssl"
    _supports_sdpa = True
    accepts_loss_kwargs = False  # losses are means over the batch, and a trainer divides them by its micro-batches
    takes: ClassVar[tuple[str, ...]]

    def __init__(self, config: MmsslConfig):
        """Raises: ValueError if the model takes something else than the task is made for."""
        super().__init__(config)
        if config.members:
            raise ValueError(f"this model takes several kinds of data ({', '.join(config.members)}); load the folder of one")
        self.mmssl = MmsslModel(config)
        self.main_input_name = self.mmssl.main_input_name
        if self.main_input_name not in self.takes:
            raise ValueError(f"{type(self).__name__} needs a model of {' or '.join(self.takes)}, not of {self.main_input_name}")
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)

    def _init_weights(self, module: nn.Module) -> None:
        """Of the head; the encoder's are drawn where its modules are built."""
        inside = {id(one) for one in self.mmssl.modules()} if hasattr(self, "mmssl") else set()
        if isinstance(module, nn.Linear) and id(module) not in inside:
            initialization.normal_(module.weight, std=0.02)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm) and id(module) not in inside:
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)

    def freeze_feature_encoder(self) -> None:
        """Keep what turns raw values to features as it is, as is usual where sound is fine-tuned."""
        encoder: Any = self.mmssl.encoder
        if isinstance(encoder, Backbone):
            raise ValueError(f"{encoder.config.backbone} has no feature encoder")
        encoder.features.requires_grad_(False)

    def _tokens(self, out: Any) -> Tensor:
        """(B, L, D) content only, extra tokens removed."""
        encoder: Any = self.mmssl.encoder
        if isinstance(encoder, Backbone):
            raise ValueError("a model of transformers as it is has no tokens for this task")
        return out.last_hidden_state[:, encoder.transformer.extra_tokens :]


class MmsslClassifier(MmsslTask):
    """A linear layer on what the encoder pools: its cls token or the mean of its tokens, as `config.pooling` says.

    The loss is that of transformers: cross entropy of class numbers, binary cross entropy of several classes at once, or mean
    squared error of one number, by `config.problem_type` or, without it, by the labels.
    """

    output: ClassVar[type[Any]] = SequenceClassifierOutput

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        self.loss_type, self.num_labels = "ForSequenceClassification", config.num_labels
        self.classifier = linear(config)
        self.post_init()

    def classify(self, labels: Tensor | None, **inputs: Any) -> Any:
        """Logits (B, classes), and the loss if there are labels."""
        return_dict = inputs.pop("return_dict")
        out = self.mmssl(**inputs)
        logits = self.classifier(self.dropout(out.pooler_output))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        found = self.output(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return found.to_tuple() if return_dict is False else found


class MmsslForImageClassification(MmsslClassifier):
    """Classes of images."""

    takes = ("pixel_values",)
    output = ImageClassifierOutput

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Classify (B, C, H, W) pixels; labels (B,)."""
        given = {"output_hidden_states": output_hidden_states, "return_dict": return_dict}
        return self.classify(labels, pixel_values=pixel_values, **given)


class MmsslForAudioClassification(MmsslClassifier):
    """Classes of recordings."""

    takes = ("input_values", "input_features")

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        input_features: Tensor | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Classify (B, samples) waves, or (B, T, F) spectrograms; attention_mask 1 = valid; labels (B,)."""
        given = {"output_hidden_states": output_hidden_states, "return_dict": return_dict, "attention_mask": attention_mask}
        return self.classify(labels, input_values=input_values, input_features=input_features, **given)


class MmsslForSequenceClassification(MmsslClassifier):
    """Classes of texts."""

    takes = ("input_ids",)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Classify (B, L) ids; attention_mask 1 = valid; labels (B,)."""
        given = {"output_hidden_states": output_hidden_states, "return_dict": return_dict, "attention_mask": attention_mask}
        return self.classify(labels, input_ids=input_ids, **given)


class MmsslForTokenClassification(MmsslTask):
    """Classes of tokens."""

    takes = ("input_ids",)

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = linear(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Classify each of (B, L) ids; labels (B, L), -100 = none, have a mean cross entropy over all that are given."""
        out = self.mmssl(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states)
        logits = self.classifier(self.dropout(self._tokens(out)))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        found = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return found.to_tuple() if return_dict is False else found


class MmsslForMaskedLM(MmsslTask):
    """Ids of hidden tokens: linear layer, GELU, norm, and the embedding table with an offset, as in BERT."""

    takes = ("input_ids",)
    _tied_weights_keys = {"decoder.weight": "mmssl.encoder.features.tokens.weight"}

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        config.tie_word_embeddings = True  # or transformers ties nothing
        width, vocabulary = config.hidden_size, getattr(config, "vocab_size", 0)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, config.norm_eps))
        self.decoder = nn.Linear(width, vocabulary)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of ids."""
        encoder: Any = self.mmssl.encoder
        return encoder.features.tokens

    def get_output_embeddings(self) -> nn.Module:
        """The same table, as a layer."""
        return self.decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """Logits (B, L, V); labels (B, L), -100 = not asked, have a mean cross entropy over all that are asked."""
        out = self.mmssl(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states)
        logits = self.decoder(self.transform(self._tokens(out)))
        loss = None if labels is None else self.loss_function(logits, labels, self.decoder.out_features)
        found = MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return found.to_tuple() if return_dict is False else found


class MmsslForCTC(MmsslTask):
    """Transcripts of recordings: logits of each frame, `config.vocab_size` of them, `config.pad_token_id` the blank.

    The loss is that of transformers' speech models, with `config.ctc_loss_reduction` (sum if unset) and
    `config.ctc_zero_infinity` (false).
    """

    takes = ("input_values", "input_features")

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        vocabulary, blank = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
        if not vocabulary or blank is None:
            raise ValueError(
                "config.vocab_size and config.pad_token_id: missing; give the size of the vocabulary and its blank"
            )
        if not 0 <= blank < vocabulary:
            raise ValueError(f"config.pad_token_id: the blank {blank} is not in a vocabulary of {vocabulary}")
        self.lm_head, self.blank = nn.Linear(config.hidden_size, vocabulary), blank
        self.post_init()

    def _get_feat_extract_output_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of recordings of so many samples, or mel frames; named as in transformers' speech models."""
        encoder: Any = self.mmssl.encoder
        place = torch.arange(int(lengths.max()), device=lengths.device)
        return (~encoder.features.pad((place < lengths[:, None]).long())).sum(1)

    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        input_features: Tensor | None = None,
    ) -> CausalLMOutput | tuple:
        """Logits (B, L, V) of waves (B, samples) or spectrograms (B, T, F); labels (B, n), -100 = padding."""
        x = input_values if input_features is None else input_features
        given = {"attention_mask": attention_mask, "output_hidden_states": output_hidden_states}
        out = self.mmssl(input_values=input_values, input_features=input_features, **given)
        logits = self.lm_head(self.dropout(self._tokens(out)))
        loss = None
        if labels is not None and x is not None:
            whole = torch.full((len(x),), x.shape[1], device=x.device)
            lengths = self._get_feat_extract_output_lengths(whole if attention_mask is None else attention_mask.sum(1))
            loss = self._loss(logits, labels, lengths)
        found = CausalLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
        return found.to_tuple() if return_dict is False else found

    def _loss(self, logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        if int(labels.max()) >= logits.shape[2]:
            raise ValueError(f"labels: {int(labels.max())}, must be below config.vocab_size={logits.shape[2]}")
        given = labels >= 0
        scores = logits.double() if logits.dtype == torch.float64 else logits.float()
        return F.ctc_loss(
            scores.log_softmax(-1).transpose(0, 1),
            labels[given],
            lengths,
            given.sum(1),
            blank=self.blank,
            reduction=getattr(self.config, "ctc_loss_reduction", "sum"),
            zero_infinity=getattr(self.config, "ctc_zero_infinity", False),
        )


TASKS: dict[str, type[MmsslTask]] = {  # class of transformers -> ours
    "AutoModelForImageClassification": MmsslForImageClassification,
    "AutoModelForAudioClassification": MmsslForAudioClassification,
    "AutoModelForCTC": MmsslForCTC,
    "AutoModelForSequenceClassification": MmsslForSequenceClassification,
    "AutoModelForTokenClassification": MmsslForTokenClassification,
    "AutoModelForMaskedLM": MmsslForMaskedLM,
}
