"""Our methods and the models of transformers that compute the same loss, with the same weights, on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmssl.config import Recipe
from mmssl.masks import spans, uniform
from mmssl.methods.wav2vec2 import distractors
from mmssl.model.mask_token import corrupt
from mmssl.random import generator
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer, schedule
from mmssl.types import Batch, Clock, Mask, View
from modalities.speech import convert as speech
from modalities.text import convert as text
from modalities.vision import convert as vision

CLOCK = Clock(0, 1000)


class Side(NamedTuple):
    """One of two that learn the same."""

    what: str
    module: nn.Module
    loss: Callable[[], Tensor]
    compared: Callable[[], Tensor]  # the part of the loss that both define alike
    optimizer: torch.optim.Optimizer
    blocks: tuple[nn.Module, ...] = ()  # what `train.compile` compiles
    after: Callable[[], None] = lambda: None  # what comes after the optimizer's step, a teacher's move
    tokens: int = 0  # of the batch, hidden ones included

    def step(self, precision: str = "fp32") -> None:
        """One update."""
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()

    @torch.no_grad()
    def check(self) -> float:
        """The loss, without dropout."""
        self.module.eval()
        found = float(self.compared())
        self.module.train()
        return found

    def compile(self) -> None:
        """As `train.compile`."""
        for block in self.blocks:
            block.compile()


class Pair(NamedTuple):
    """Two with the same weights and the same batch."""

    ours: Side
    theirs: Side


def own_side(what: str, recipe: Recipe, method: Any, batch: Batch, compared: Callable[[], Tensor] | None = None) -> Side:
    """A method in what trains it, with the recipe's optimizer. method: on its device."""
    objective = Objective(method)
    tensors, keys = batch.tensors(), batch.keys

    def loss() -> Tensor:
        return objective(tensors, keys, CLOCK)["total"]

    optimizer = build_optimizer(objective, recipe.optim, schedule(recipe.optim, recipe.train.global_batch, 1.0))
    blocks = tuple(block for trunk in method.modules() if hasattr(trunk, "blocks") for block in trunk.blocks)
    tokens = sum(view.mask.hidden.numel() for view in batch.views if view.mask is not None)
    return Side(what, objective, loss, compared or loss, optimizer, blocks, lambda: method.after_step(CLOCK), tokens)


def their_side(module: nn.Module, loss: Callable[[], Tensor], compared: Callable[[], Tensor] | None = None) -> Side:
    """A model of transformers with the optimizer of its Trainer."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)
    return Side(type(module).__name__, module, loss, compared or loss, optimizer)


def mae(samples: int, device: str = "cpu", *words: str) -> Pair:
    """ViT-B/16 on 224 pixels, 49 of 196 patches visible, decoder of 8 layers."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    recipe = Recipe.load("vision/mae-base", *words)
    method: Any = recipe.build()
    native = vision.to_native(recipe.config(), method.student.encoder.state_dict(), kind="vit_mae")
    assert native is not None
    d = method.decoder
    shape = {"decoder_hidden_size": d.embed.out_features, "decoder_num_hidden_layers": len(d.blocks)}
    shape |= {"decoder_num_attention_heads": d.blocks[0].attn.heads, "decoder_intermediate_size": 4 * d.embed.out_features}
    config = ViTMAEConfig(**{**native[0].to_dict(), **shape, "norm_pix_loss": True, "mask_ratio": 0.75})
    model: Any = ViTMAEForPreTraining(config)
    load(model, base(model, native[1]) | mae_decoder(d.state_dict(), d.codes))
    method, model = method.to(device).train(), model.to(device).train()
    side = recipe.config().image_size
    x = torch.randn(samples, 3, side, side, generator=generator("bench")).to(device)
    noise = torch.rand(samples, d.codes.shape[0], generator=generator("bench", "noise")).to(device)
    kept = noise.argsort(1)[:, : d.codes.shape[0] // 4]
    mask = Mask.of(torch.ones_like(noise, dtype=torch.bool).scatter_(1, kept, False))
    batch = Batch([View(x, "vision", mask=mask)], torch.arange(samples), tuple(range(samples)))
    return Pair(own_side("ViT-B/16, 224 pixels", recipe, method, batch), their_side(model, lambda: model(x, noise=noise).loss))


def mae_decoder(weights: dict[str, Tensor], codes: Tensor) -> dict[str, Tensor]:
    """The weights of our decoder under the names of `ViTMAEForPreTraining`. codes: (L, D) of places."""
    names = {"embed": "decoder_embed", "norm": "decoder_norm", "proj": "decoder_pred"}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    found = {"decoder.mask_token": weights["token"].view(1, 1, -1)}
    found["decoder.decoder_pos_embed"] = torch.cat([torch.zeros_like(codes[:1]), codes])[None]
    for name, weight in weights.items():
        if name.startswith("blocks."):
            _, i, part, *_ = name.split(".")
            kind = name.rsplit(".", 1)[1]
            own, place = name.removeprefix(f"blocks.{i}.").removesuffix(f".{kind}"), f"decoder.decoder_layers.{i}"
            if own == "attn.qkv":
                thirds = zip("qkv", weight.chunk(3), strict=True)
                found |= {f"{place}.attention.{each}_proj.{kind}": third for each, third in thirds}
            else:
                found[f"{place}.{inner.get(own, own)}.{kind}"] = weight
        elif (part := name.split(".")[0]) in names:
            found[f"decoder.{name.replace(part, names[part], 1)}"] = weight
    return found


def wav2vec2(samples: int, device: str = "cpu", *words: str) -> Pair:
    """The base model on two seconds of sound, 65 % of frames in spans. Theirs is given the distractors that ours draws."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    recipe = Recipe.load("speech/wav2vec2-base", "model.layer_drop=0", *words)
    method: Any = recipe.build()
    native = speech.to_native(recipe.config(), method.student.encoder.state_dict())
    assert native is not None
    options = {"num_negatives": method.negatives, "codevector_dim": 256, "proj_codevector_dim": 256, "mask_time_prob": 0.65}
    options |= {"feat_proj_dropout": 0.1, "feat_quantizer_dropout": 0.1, "activation_dropout": 0.0}
    model: Any = Wav2Vec2ForPreTraining(Wav2Vec2Config(**{**native[0].to_dict(), **options}))
    q, state = method.quantizer, method.state_dict()
    weights = base(model, native[1])
    weights["wav2vec2.masked_spec_embed"] = state["listening.mask_token.vector"]
    weights["quantizer.codevectors"] = q.entries.view(1, -1, q.entries.shape[-1])
    for own, other in {"quantizer.logits": "quantizer.weight_proj", "predict": "project_hid", "project": "project_q"}.items():
        weights |= {f"{other}.{kind}": state[f"{own}.{kind}"] for kind in ("weight", "bias")}
    load(model, weights)
    method, model = method.to(device).train(), model.to(device).train()
    x = torch.randn(samples, 32_000, generator=generator("bench")).to(device)
    frames = method.student.encoder.features.frames(x.shape[1])
    mask = Mask.of(spans(frames, samples, 0.65, 10, generator("bench", "mask")).to(device))
    batch = Batch([View(x, "speech", mask=mask)], torch.arange(samples), tuple(range(samples)))
    hidden, places = mask.hidden, mask.rest
    others = places[torch.arange(samples)[:, None, None], distractors(batch.keys, places, method.negatives)]
    negatives = torch.zeros(samples, frames, method.negatives, dtype=torch.int64, device=device)
    negatives[hidden] = (others + frames * torch.arange(samples, device=device)[:, None, None]).flatten(0, 1)

    def theirs() -> Any:
        return model(x, mask_time_indices=hidden, sampled_negative_indices=negatives)

    def contrast() -> Tensor:
        return method(batch, CLOCK).losses["contrastive"]

    other = their_side(model, lambda: theirs().loss, lambda: theirs().contrastive_loss / places.numel())
    return Pair(own_side("base, two seconds", recipe, method, batch, contrast), other)


def mlm(samples: int, device: str = "cpu", *words: str) -> Pair:
    """RoBERTa base on texts of 128 tokens, of which 15 % are to be said. Theirs is given the ids that ours corrupts."""
    from transformers import RobertaForMaskedLM

    recipe = Recipe.load("text/mlm-base", "views.tokenizer=null", *words)
    method: Any = recipe.build()
    native = text.to_native(recipe.config(), method.student.encoder.state_dict())
    assert native is not None
    model: Any = RobertaForMaskedLM(native[0])
    weights = {name: weight for name, weight in base(model, native[1]).items() if "pooler" not in name}
    for own, other in {"0": "dense", "2": "layer_norm"}.items():
        weights |= {f"lm_head.{other}.{kind}": method.state_dict()[f"head.{own}.{kind}"] for kind in ("weight", "bias")}
    load(model, weights)
    method, model = method.to(device).train(), model.to(device).train()
    draw, features = generator("bench"), method.student.encoder.features
    ids = torch.randint(4, features.tokens.num_embeddings - 1, (samples, 128), generator=draw).to(device)
    hidden = uniform(128, samples, 0.15, draw).to(device)
    view = View(ids, "text", mask=Mask.of(hidden))  # as those of a recipe do, it tells how many a row hides
    batch = Batch([view], torch.arange(samples), tuple(range(samples)))
    seen, labels = corrupt(view, features, batch.keys, method.corruption).x, ids.masked_fill(~hidden, -100)
    return Pair(
        own_side("RoBERTa base, 128 tokens", recipe, method, batch),
        their_side(model, lambda: model(input_ids=seen, labels=labels).loss),
    )


def base(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the encoder, as released files call them, under the names that the whole model has."""
    kind = type(getattr(model, model.base_model_prefix))
    encoder = kind.from_pretrained(None, config=model.config, state_dict=weights)
    return {f"{model.base_model_prefix}.{name}": weight for name, weight in encoder.state_dict().items()}


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises: RuntimeError if a weight of the model is left as it was drawn, but for what is tied or not used."""
    found = model.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(ALONE)]
    if found.unexpected_keys or missing:
        raise RuntimeError(f"weights without a place: {found.unexpected_keys}; without a value: {missing}")


# Tied to the embedding, or never changed from the zeros that ours has too.
ALONE = ("lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.bias")
PEERS: dict[str, Callable[..., Pair]] = {"mae": mae, "wav2vec2": wav2vec2, "mlm": mlm}
