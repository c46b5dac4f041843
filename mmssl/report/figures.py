"""Pictures of what a trained encoder makes of the run's data, `report/NAME-STEP.png`, each with a caption beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmssl.config import JointRecipe, Recipe, load_recipe
from mmssl.errors import RecipeError
from mmssl.evaluate import gallery
from mmssl.evaluate.features import DrawnSet, Loaded, PlainSet, embed, open_sets
from mmssl.evaluate.probe import inputs_of, pooled
from mmssl.methods import METHODS
from mmssl.model.encoder import Encoder
from mmssl.model.released import load_encoder
from mmssl.registry import Modality, modality
from mmssl.training.run_folder import RunFolder, storing, write_atomic
from mmssl.types import Batch, View

SHOWN, QUERIES, NEIGHBOURS = 8, 6, 5  # samples of a sheet; of a gallery, and what stands beside each
FEW, MANY = 128, 512  # samples that are embedded at the end of a run, and on demand
ACROSS, THUMB, GAP, LINE = 2, 130, 8, 15  # images in a row of a sheet; pixels: width of a neighbour, between images, of letters
ROUNDING = 1e-6  # share of the largest singular value below which one is none
SMALL = 300  # pixels, width up to which images stand side by side

Picture = tuple[Any, str]  # what has save(path), and its caption


class Looked(NamedTuple):
    """A set of samples as an encoder sees it."""

    kind: Modality
    views: Any
    encoder: Encoder | None  # None where it is another network than the shared transformer
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    data: PlainSet
    name: str  # of the split
    rows: dict[str, Tensor]  # as of `features.embed`
    recipe: Recipe
    step: int

    @property
    def about(self) -> str:
        """What a caption ends with."""
        return f"{len(self.rows['embedding'])} samples of {self.name}, at step {self.step}."

    def view(self, positions: Sequence[int]) -> View:
        """Those of the rows, as the encoder is given them."""
        indices = [int(self.rows["index"][place]) for place in positions]
        data = PlainSet(self.data.source, self.kind, self.views, indices)
        return Batch.from_tensors(data.collate([data[i] for i in range(len(data))])).views[0]

    def sketch(self, view: View, colours: Tensor | None = None) -> list[Image.Image]:
        """An image of each sample, with the colours of its tokens, (B, L, 3), if they are given."""
        assert self.kind.sketch is not None
        return self.kind.sketch(view, self.views, getattr(self.encoder, "features", None), colours)

    def label(self, position: int) -> str:
        """The name of its class, "" if it has none."""
        found, names = int(self.rows["label"][position]), self.data.source.facts.get("classes") or []
        return names[found] if 0 <= found < len(names) else ""


def draw(run: str | Path, everything: bool = True) -> list[Path]:
    """Draw what RUN/model makes of the run's data.

    Args:
        everything: otherwise of fewer samples, and nothing that needs a plotting library or an iteration.
    Returns: the files.
    Raises: MmsslError if there is no model, or the data are not where they were.
    """
    folder = RunFolder.open(run)
    if not (folder.model / "config.json").is_file():
        raise RecipeError(f"{run}: there is no model yet; the first is written with the first checkpoint (save.every).")
    recipe, written = load_recipe(folder.config), []
    for name, one in recipe.members.items():
        model = folder.model / name if isinstance(recipe, JointRecipe) else folder.model
        try:
            looked = look(one, model, int(folder.read_status().get("step") or 0), MANY if everything else FEW)
        except ValueError as error:  # the recipe was checked: what it names is no longer there
            raise RecipeError(f"{run}: {error}") from error
        if looked.kind.sketch is None:
            continue
        made = {**sheets(looked), **(plots(looked) if everything else {})}
        for what, (picture, caption) in made.items():
            path = folder.path / "report" / f"{name and f'{name}-'}{what}-{looked.step:07d}.png"
            with storing(path):
                path.parent.mkdir(exist_ok=True)
                picture.save(path)
                write_atomic(path.with_suffix(".txt"), caption + "\n")
            written.append(path)
    return written


def look(recipe: Recipe, model: Path, step: int, samples: int) -> Looked:
    """Embed samples of the split that probes classify, or of the one that is learned from."""
    kind, network = modality(recipe.data.modality), load_encoder(model)
    views, device = kind.plain_views(network, model), "cuda" if torch.cuda.is_available() else "cpu"
    watch = recipe.watch.model_copy(update={"samples": samples})
    sets = open_sets(recipe.data, watch, kind, views, recipe.train.seed)
    data, name = (sets.test.data, sets.name) if sets.test is not None else (sets.train.data, watch.train)
    network.to(device)

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        (view,) = Batch.from_tensors({name: tensor.to(device) for name, tensor in batch.items()}).views
        inputs = inputs_of(view, network)
        return {"embedding": pooled(network(**inputs), view, inputs, network)}

    rows = embed(Loaded(data, min(samples, 32), 0), run)
    encoder = getattr(network, "encoder", None)
    return Looked(kind, views, encoder if isinstance(encoder, Encoder) else None, run, data, name, rows, recipe, step)


def sheets(looked: Looked) -> dict[str, Picture]:
    """Name -> what is drawn of samples themselves."""
    count, found = len(looked.rows["embedding"]), {}
    if looked.encoder is not None:
        chosen = torch.linspace(0, count - 1, min(SHOWN, count)).long().unique().tolist()
        view = looked.view(chosen)
        encoded, weights = gallery.attended(looked.encoder.cpu(), view)
        colours = gallery.first_components(encoded.tokens, encoded.pad)
        of = f"Of {len(chosen)} of the samples of {looked.name}, at step {looked.step}."
        found["patches"] = (
            _sheet(looked, view, colours),
            "Each sample, and the first three principal components of its last tokens as red, green and blue; they are those "
            f"of the tokens of all of them together, each from its 1st to its 99th percentile. {of}",
        )
        heat = weights / weights.amax(1, keepdim=True).clamp(min=1e-12)
        whose = "of cls" if looked.encoder.transformer.extra_tokens else "of the mean query"
        found["attention"] = (
            _sheet(looked, view, torch.stack([heat, heat.square(), 0.35 * (1 - heat)], -1)),
            f"Each sample, and the attention {whose} in the last layer as a mean over its heads: dark for none, yellow for the "
            f"most within the sample. {of}",
        )
    if count > 1:
        found["neighbours"] = _neighbours(looked)
    return found


def _sheet(looked: Looked, view: View, colours: Tensor) -> Image.Image:
    images = looked.sketch(view, colours)
    across = ACROSS if images[0].width <= SMALL else 1
    return tiled([[(image, "") for image in images[i : i + across]] for i in range(0, len(images), across)])


def _neighbours(looked: Looked) -> Picture:
    features = looked.rows["embedding"]
    queries = torch.linspace(0, len(features) - 1, min(QUERIES, len(features))).long().unique()
    found, cosines = gallery.nearest(features, queries, NEIGHBOURS)
    rows = []
    for query, others, near in zip(queries.tolist(), found.tolist(), cosines.tolist(), strict=True):
        images = looked.sketch(looked.view([query, *others]))
        named = [f"query  {looked.label(query)}", *(f"{c:.2f}  {looked.label(p)}" for c, p in zip(near, others, strict=True))]
        rows.append([(_thumb(image), text) for image, text in zip(images, named, strict=True)])
    if rows[0][0][0].width > SMALL:  # texts stand below each other
        rows = [[cell] for row in rows[: QUERIES // 2] for cell in row]
    caption = (
        f"Each query, and the {found.shape[1]} samples most like it by the cosine of their pooled features, nearest first, "
        f"with cosine and class. Out of {looked.about}"
    )
    return tiled(rows), caption


def _thumb(image: Image.Image) -> Image.Image:
    if image.width > SMALL:
        return image
    return image.resize((THUMB, max(1, round(image.height * THUMB / image.width))), Image.Resampling.BILINEAR)


def tiled(rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Images with a line of text below each, "" for none, side by side and row by row on white."""
    font: Any = ImageFont.load_default(11)
    width = max(sum(image.width + GAP for image, _ in row) for row in rows) + GAP
    tall = [max(image.height for image, _ in row) + GAP + (LINE if any(text for _, text in row) else 0) for row in rows]
    sheet = Image.new("RGB", (width, sum(tall) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, tall, strict=True):
        left = GAP
        for image, text in row:
            sheet.paste(image, (left, top))
            pen.text((left, top + image.height + 1), _cut(text, image.width, font), "black", font)
            left += image.width + GAP
        top += height
    return sheet


def _cut(text: str, width: int, font: Any) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def plots(looked: Looked) -> dict[str, Picture]:
    """Name -> what is drawn of all features together."""
    features, found = looked.rows["embedding"].float(), {}
    if len(features) < 4:
        return found
    found["map"] = _map(looked, features)
    found["similarity"] = _similarity(looked, features)
    values = gallery.spectrum(features)
    values = values[values > ROUNDING]
    figure, axes = _axes()
    axes.semilogy(range(1, len(values) + 1), values, marker="." if len(values) < 50 else None)
    axes.set(xlabel="number", ylabel="share of the largest")
    caption = (
        "Singular values of the centred pooled features. A cliff says that few dimensions carry everything, a gentle slope "
        f"that many do. Of {looked.about}"
    )
    found["spectrum"] = figure, caption
    return found


def _axes() -> tuple[Any, Any]:
    """A figure that can be read on a phone; without pyplot, which would keep it."""
    from matplotlib.figure import Figure

    figure = Figure((5.2, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return _Saved(figure), axes


class _Saved:
    """A figure with the method of an image."""

    def __init__(self, figure: Any):
        self.figure = figure

    def save(self, path: Path) -> None:
        """As PNG."""
        self.figure.savefig(path)


def _map(looked: Looked, features: Tensor) -> Picture:
    places, labels = gallery.flat_map(features), looked.rows["label"]
    figure, axes = _axes()
    from matplotlib import colormaps

    shown = colormaps["tab20"]
    for number, (label, name) in enumerate(_classes(looked, labels)):
        own = places[labels == label]
        axes.scatter(own[:, 0], own[:, 1], s=9, label=name or None, color=shown(number % 20) if label >= 0 else "grey")
    axes.axis("off")
    named = axes.get_legend_handles_labels()[1]
    if 0 < len(named) <= 20:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    colour = "Colours are classes, which the training did not see. " if named else ""
    return figure, (
        "t-SNE of the pooled features, by cosine: near points have similar features, distances of groups mean little. "
        f"{colour}{looked.about}"
    )


def _classes(looked: Looked, labels: Tensor) -> Iterator[tuple[int, str]]:
    """Labels that occur, with their names."""
    for label in labels.unique().tolist():
        yield label, looked.label(int((labels == label).nonzero()[0]))


def _similarity(looked: Looked, features: Tensor) -> Picture:
    figure, axes = _axes()
    bins = torch.linspace(-1, 1, 61).tolist()
    axes.hist(gallery.random_pairs(features).tolist(), bins, alpha=0.6, density=True, label="two samples")
    name: str = looked.recipe.method.name  # type: ignore[attr-defined]
    several = METHODS[name].views > 1
    if several:
        axes.hist(_positives(looked).tolist(), bins, alpha=0.6, density=True, label="two views of a sample")
    axes.set(xlabel="cosine", yticks=[])
    axes.legend(fontsize=8, frameon=False)
    both = "two random views of each sample, and of " if several else ""
    return figure, (
        f"Cosines of the pooled features of {both}pairs of different samples, as densities. All near 1 means that outputs are "
        f"alike. {looked.about}"
    )


def _positives(looked: Looked) -> Tensor:
    """(n,) cosines of two random views of each sample that gives both."""
    seed, data = looked.recipe.train.seed, looked.data
    data = PlainSet(data.source, data.kind, looked.recipe.build_views(), data.indices)
    drawn = (embed(Loaded(DrawnSet(data, seed, epoch), 32, 0), looked.run) for epoch in range(2))
    first, second = ({int(i): row for i, row in zip(rows["index"], rows["embedding"], strict=True)} for rows in drawn)
    both = [i for i in first if i in second]
    return torch.cosine_similarity(torch.stack([first[i] for i in both]), torch.stack([second[i] for i in both]))
