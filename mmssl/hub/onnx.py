"""An encoder for ONNX Runtime, which needs neither torch nor transformers."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.config import Recipe
from mmssl.errors import MmsslError, RecipeError
from mmssl.hub.export import weights_of
from mmssl.model.modeling import MmsslModel
from mmssl.registry import modality

OUTPUTS = ("last_hidden_state", "pooler_output")
TOLERANCE = 1e-4  # largest difference from torch that is left in place; of outputs above 1, as a share of the largest
BIG = 1 << 30  # bytes of weights from which they stand beside the graph, as a file of protobuf cannot hold 2 GiB


class Graph(nn.Module):
    """What is traced: the model without branches that depend on values.

    Args:
        name: keyword of the model.
    """

    def __init__(self, model: MmsslModel, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, ...) and its mask, 1 = valid -> `OUTPUTS`."""
        encoder: Any = self.model.encoder
        pad = None if attention_mask is None else encoder.features.pad(attention_mask)
        out = self.model(**{self.name: x}, pad=pad)
        return out.last_hidden_state, out.pooler_output


@torch.no_grad()
def write_onnx(recipe: Recipe, views: Any, tensors: dict[str, Tensor], which: str, path: Path) -> None:
    """model.onnx, config.json and what prepares its input.

    Inputs are named as transformers does, the batch is of any size, sound and text of any length. ONNX Runtime must give what
    torch does, on inputs of two sizes.

    Raises: RecipeError if the packages are missing; MmsslError if torch cannot export the encoder, or results differ.
    """
    runtime = _packages()
    config, kind = recipe.config(), modality(recipe.data.modality)
    model = MmsslModel(config).eval()
    model.encoder.load_state_dict(weights_of(tensors, which))
    name = model.main_input_name
    tried = [example(model, recipe, rows, share) for rows, share in ((2, 0.5), (3, 0.8))]
    shapes = {key: dict.fromkeys(_free(key), torch.export.Dim.DYNAMIC) for key in tried[0]}
    file = path / "model.onnx"
    try:
        with _quiet():
            torch.onnx.export(
                Graph(model, name),
                tuple(tried[0].values()),
                file,
                input_names=[*tried[0]],
                output_names=[*OUTPUTS],
                dynamic_shapes=tuple(shapes.values()),
                external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > BIG,
                dynamo=True,
                verbose=False,
            )
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = [session.run([*OUTPUTS], {key: x.numpy() for key, x in given.items()}) for given in tried]
    except Exception as error:  # torch.export, onnxscript and the runtime each have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MmsslError(f"onnx: this encoder cannot be exported by torch {torch.__version__}: {reason}") from error
    for given, theirs in zip(tried, found):
        ours = model(**given)
        for output, mine, other in zip(OUTPUTS, (ours.last_hidden_state, ours.pooler_output), map(torch.from_numpy, theirs)):
            apart = (mine - other).abs().max().item() if mine.shape == other.shape else float("inf")
            if not apart <= TOLERANCE * max(1.0, mine.abs().max().item()):
                raise MmsslError(
                    f"onnx: {output} of ONNX Runtime differs from that of torch by {apart:.2g}; nothing was written."
                )
    config.save_pretrained(path)
    kind.processor(config, views).save_pretrained(path)


def example(model: MmsslModel, recipe: Recipe, rows: int, share: float) -> dict[str, Tensor]:
    """Inputs of a model, the last row of which is padded where rows can be.

    Args:
        share: of the longest input.
    """
    draw, options, features = torch.Generator().manual_seed(rows), recipe.model, getattr(model.encoder, "features", None)
    name = model.main_input_name
    if name == "pixel_values":
        side: Any = options.image_size  # type: ignore[attr-defined]
        return {name: torch.randn(rows, options.channels, side, side, generator=draw)}  # type: ignore[attr-defined]
    assert features is not None, "backbones are of images"
    if name == "input_values":
        length = round(32_000 * share)
        x = torch.randn(rows, length, generator=draw)
    elif name == "input_features":
        length = round(features.grid[0] * share) * features.patch_frames
        x = torch.randn(rows, length, features.bands, generator=draw)
    else:
        length = max(2, round(features.max_tokens * share))
        x = torch.randint(features.tokens.num_embeddings, (rows, length), generator=draw)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, round(length * 0.7) :] = 0
    if name == "input_ids":
        x = x.masked_fill(x == features.pad_token_id, features.tokens.num_embeddings - 1)
        x = x.masked_fill(mask == 0, features.pad_token_id)
    return {name: x, "attention_mask": mask}


def _free(name: str) -> tuple[int, ...]:
    """Axes of an input of any size: of rows, and what is as long as a sample."""
    return (0,) if name == "pixel_values" else (0, 1)


def _packages() -> Any:
    """ONNX Runtime. Raises: RecipeError if it, or what torch exports by, is missing."""
    try:
        import onnx  # type: ignore[import-not-found]  # noqa: F401  # optional
        import onnxruntime  # type: ignore[import-not-found]
        import onnxscript  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"onnx: needs onnx, onnxscript and onnxruntime ({error}): pip install 'mmssl[onnx]'; or take another format."
        ) from None
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
