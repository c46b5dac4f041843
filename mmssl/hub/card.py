"""The model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmssl.config import Recipe
from mmssl.registry import modality

LOADERS = {  # keyword of the model -> what prepares its input
    "pixel_values": ("AutoImageProcessor", "image"),
    "input_values": ("AutoFeatureExtractor", "wave, sampling_rate=16_000"),
    "input_features": ("AutoFeatureExtractor", "wave, sampling_rate=16_000"),
    "input_ids": ("AutoTokenizer", "text"),
}


OWN_CODE = ", trust_remote_code=True)  # with `import mmssl` before, no remote code is needed"


def joint_card(
    members: Mapping[str, Recipe],
    which: Mapping[str, str],
    trunks: Mapping[str, str],
    recipe: str,
    metrics: dict[str, float],
    step: int | None,
) -> str:
    """Markdown for a folder that holds one model of several kinds of data, and one of each.

    Args:
        which: member -> student or teacher.
        trunks: member -> the one whose transformer it has.
    """
    names = [*members]
    takes = {name: modality(member.data.modality).features.input_name for name, member in members.items()}  # type: ignore[attr-defined]
    lines = []
    for name, kind in takes.items():
        loader, given = LOADERS[kind]
        said = f', member="{name}"' if [*takes.values()].count(kind) > 1 else ""
        lines.append(
            f'prepare = {loader}.from_pretrained("PATH", subfolder="{name}")\n'
            f'features = model(**prepare({given}, return_tensors="pt"){said}).pooler_output  # {name}\n'
        )
    loaders = sorted({"AutoModel", *(LOADERS[kind][0] for kind in takes.values())})
    apart = "".join(
        f" {name} is the {which[name]} of its method, and its transformer is not that of {names[0]}."
        for name in names
        if trunks[name] == name != names[0]
    )
    rows = "".join(f"| `{key}` | {value:.4g} |\n" for key, value in sorted(metrics.items()))
    table = f"\n## Last measured\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    folders = "".join(
        f"* `{name}/`: the {which[name]} of {member.method.name}\n"  # type: ignore[attr-defined]
        for name, member in members.items()
    )
    length = f"{step} updates" if step else "an unknown number of updates"
    return f"""---
library_name: transformers
tags: [self-supervised, multimodal]
---

# Encoders of {", ".join(names)} with one transformer

Trained together without labels by mmssl, {length}. One model takes the inputs of all, those of one kind in each call.{apart}

```python
from transformers import {", ".join(loaders)}
model = AutoModel.from_pretrained("PATH"{OWN_CODE}

{chr(10).join(lines)}```

Each folder prepares inputs, and is a model of its own, with a card that says how to load it:

{folders}{table}
## Recipe

```yaml
{recipe}```
"""


def card(
    recipe: Recipe,
    which: str,
    metrics: dict[str, float],
    step: int | None,
    architecture: str = "MmsslModel",
    beside: Sequence[str] = (),
) -> str:
    """Markdown with what a reader needs to use the model: origin, training, measurements, the lines that load it.

    Args:
        beside: other kinds of data that the transformer was trained on in the same run.
    """
    from mmssl.methods import METHODS

    own = architecture == "MmsslModel"
    trust = OWN_CODE if own else ")"
    if own:
        pooled = ".pooler_output"
    elif recipe.wrapped:
        pooled = ".pooler_output.flatten(1)"
    else:
        first = recipe.model.extra_tokens  # type: ignore[attr-defined]  # content comes after cls
        pooled = f".last_hidden_state[:, {first}:].mean(1)  # of one sample, without padding"
    stem = " with a small stem" if recipe.wrapped and recipe.model.stem == "small" else ""  # type: ignore[attr-defined]
    shape = f"{recipe.model.backbone}{stem} ({architecture})" if recipe.wrapped else architecture  # type: ignore[attr-defined]
    loader, given = LOADERS[modality(recipe.data.modality).features.input_name]  # type: ignore[index]
    name = recipe.method.name  # type: ignore[attr-defined]
    rows = "".join(f"| `{key}` | {value:.4g} |\n" for key, value in sorted(metrics.items()))
    table = f"\n## Last measured\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    length = f"{step} updates" if step else "an unknown number of updates"
    together = f" Its transformer learned from {' and '.join(beside)} as well; the recipe below is its part." if beside else ""
    return f"""---
library_name: transformers
tags: [self-supervised, {recipe.data.modality}, {name}]
---

# {recipe.data.modality} encoder, {name}

The {which} of a {name} run ({METHODS[name].paper}), {length} of {recipe.train.global_batch} samples.
Architecture: {shape}. Trained without labels by mmssl.{together}

```python
from transformers import AutoModel, {loader}
model = AutoModel.from_pretrained("PATH"{trust}
prepare = {loader}.from_pretrained("PATH")
features = model(**prepare({given}, return_tensors="pt")){pooled}
```
{table}
## Recipe

```yaml
{recipe.dump()}```
"""
