"""The model card."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from mmssl.config import Recipe
from mmssl.registry import modality

LOADERS = {  # keyword of the model -> what prepares its input
    "pixel_values": ("AutoImageProcessor", "image"),
    "input_values": ("AutoFeatureExtractor", "wave, sampling_rate=16_000"),
    "input_features": ("AutoFeatureExtractor", "wave, sampling_rate=16_000"),
    "input_ids": ("AutoTokenizer", "text"),
}

PIPELINES = {"pixel_values": "image-feature-extraction"}  # the Hub's names of tasks
LICENCE = ("license", "license_name", "license_link")
ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"  # on the Hub
GAINED = "change/"  # metrics of a run that has ended, see mmssl/training/change.py
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
    (first, *others), said = members, {name: member.method.name for name, member in members.items()}  # type: ignore[attr-defined]
    apart = "".join(f" The transformer of {name} is another than that of {first}." for name in others if trunks[name] == name)
    folders = "".join(f"* `{name}/`: {which[name]} of {method}\n" for name, method in said.items())
    return f"""{_head([*members.values()], ["self-supervised", "multimodal"], "feature-extraction")}
# Encoders of {", ".join(members)}{"" if apart else " with one transformer"}

Trained together without labels by mmssl, {_length(step)}. One model takes the input of each, of one in a call.{apart}

```python
{_example({name: _input(member) for name, member in members.items()})}```

Each folder prepares inputs, and is a model of its own, with a card that says how to load it:

{folders}{_table(metrics)}{_licence([*members.values()])}
## Recipe

```yaml
{shown(recipe)}```
"""


def converted_card(title: str, which: str, source: str, config: Any, architecture: str, note: str) -> str:
    """Markdown for a folder made of a checkpoint that others have published.

    Args:
        source: name of the file.  note: a sentence about what the folder lacks, or "".
    """
    own, features = architecture == "MmsslModel", modality(config.modality).features
    loader, given = LOADERS[features.input_name]  # type: ignore[index]
    pooled = (
        ".pooler_output" if own else f".last_hidden_state[:, {config.extra_tokens}:].mean(1)  # of one sample, without padding"
    )
    return f"""---
library_name: transformers
tags: [self-supervised, {config.modality}]
---

# {config.modality} encoder, {title}

The {which} of `{source}`, converted by mmssl; its weights keep their licence. Architecture: {architecture}. {note}

```python
from transformers import AutoModel, {loader}
model = AutoModel.from_pretrained("PATH"{OWN_CODE if own else ")"}
prepare = {loader}.from_pretrained("PATH")
features = model(**prepare({given}, return_tensors="pt")){pooled}
```
"""


def shown(recipe: str) -> str:
    """A recipe for others: of local files and folders the names, and not where they are.

    Args:
        recipe: as YAML.
    """
    return yaml.safe_dump(_named(yaml.safe_load(recipe)), sort_keys=False)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_named(one) for one in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if "/" not in text or "://" in text:
        return False
    return text.startswith(("/", "~", "./", "../")) or Path(text).exists() or not (re.fullmatch(ID, text) or " " in text)


def _is_id(text: str | None) -> bool:
    """Whether that is, in all likelihood, the name of something on the Hub."""
    return text is not None and "/" in text and re.fullmatch(ID, text) is not None and not Path(text).exists()


@lru_cache(maxsize=8)
def origin(init: str) -> dict[str, Any]:
    """What a card says of the model that a run began with: `base_model` on the Hub, and the licence of that, where known.

    Args:
        init: a folder, whose own card knows, or a Hub id.
    """
    path = Path(init)
    base = None if path.exists() else init
    try:
        told = ModelCard.load(path / "README.md" if base is None else init).data.to_dict()
    except Exception:  # no card, no network, or one that is malformed: the model is usable all the same
        told = {}
    if base is not None:
        print(
            f"mmssl: note: the model card inherits {told.get('license', 'an unknown licence')} from {init}; check its terms "
            "before you share what you train.",
            file=sys.stderr,
        )
    found = {"base_model": base or told.get("base_model")} | {name: told.get(name) for name in LICENCE}
    return {name: value for name, value in found.items() if value}


def _origins(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    inits = dict.fromkeys(recipe.model.init for recipe in recipes)  # type: ignore[attr-defined]
    return [found for init in inits if init and (found := origin(init))]


def _head(recipes: Sequence[Recipe], tags: list[str], pipeline: str) -> str:
    """What the Hub reads of a card."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline, "tags": tags}
    origins, sets = _origins(recipes), [recipe.data.path for recipe in recipes if _is_id(recipe.data.path)]
    bases = [one["base_model"] for one in origins if "base_model" in one]
    head |= {"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}
    head |= {"datasets": sets} if sets else {}
    if len({one.get("license") for one in origins}) == 1:
        head |= {name: value for name, value in origins[0].items() if name in LICENCE}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, default_flow_style=None, width=1000)}---\n"


def _licence(recipes: Sequence[Recipe]) -> str:
    """What holds for weights that began as others'."""
    lines = [
        f"* {one['base_model']}: {one.get('license', 'unknown; look it up before you share this model')}\n"
        for one in _origins(recipes)
        if "base_model" in one
    ]
    text = "The weights began as those of another model, whose licence holds here as well; check that it allows what you plan."
    return f"\n## Licence\n\n{text}\n\n{''.join(lines)}" if lines else ""


def _example(inputs: Mapping[str, str]) -> str:
    """Lines that load a model of several members and call it for each. inputs: member -> keyword of the model."""
    lines = [
        f"from transformers import {', '.join(sorted({'AutoModel', *(LOADERS[kind][0] for kind in inputs.values())}))}",
        f'model = AutoModel.from_pretrained("PATH"{OWN_CODE}',
        "features = {}",
    ]
    for name, kind in inputs.items():
        loader, given = LOADERS[kind]
        whose = f', member="{name}"' if [*inputs.values()].count(kind) > 1 else ""
        lines += [
            f'\nprepare = {loader}.from_pretrained("PATH", subfolder="{name}")',
            f'features["{name}"] = model(**prepare({given}, return_tensors="pt"){whose}).pooler_output',
        ]
    return "\n".join(lines) + "\n"


def _input(recipe: Recipe) -> str:
    """Keyword of the model."""
    features: Any = modality(recipe.data.modality).features
    return features.input_name


def _length(step: int | None) -> str:
    return f"{step} updates" if step else "an unknown number of updates"


def _table(metrics: dict[str, float]) -> str:
    plain = {key: value for key, value in metrics.items() if not key.startswith(GAINED)}
    rows = "".join(f"| `{key}` | {value:.4g} |\n" for key, value in sorted(plain.items()))
    return (f"\n## Last measured\n\n| metric | value |\n|---|---|\n{rows}" if rows else "") + _gains(metrics)


def _gains(metrics: dict[str, float]) -> str:
    """What training has changed, of each set: by classifiers with the interval of the gain, and the rank of features."""
    rows = ""
    for key in sorted(name.removesuffix("_before") for name in metrics if name.startswith(GAINED) and name.endswith("_before")):
        where, _, what = key.removeprefix(GAINED).rpartition("/")
        before, after = metrics[f"{key}_before"], metrics[f"{key}_after"]
        if f"{key}_gain" in metrics:
            gain, low, high = (100 * metrics[f"{key}_{part}"] for part in ("gain", "low", "high"))
            rows += f"| {where} {what} | {before:.1%} | {after:.1%} | {gain:+.1f} points ({low:+.1f} to {high:+.1f}) |\n"
        else:
            rows += f"| {where} effective {what} | {before:.1f} | {after:.1f} | |\n"
    title = (
        "\n## Before and after training\n\n| | before | after | gain, 95 % interval over test samples |\n|---|---|---|---|\n"
    )
    return title + rows if rows else ""


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
    loader, given = LOADERS[_input(recipe)]
    name = recipe.method.name  # type: ignore[attr-defined]
    together = f" Its transformer learned from {' and '.join(beside)} as well; the recipe below is its part." if beside else ""
    tags = ["self-supervised", recipe.data.modality, *name.split("+")]
    source = f" on {Path(recipe.data.path).name}" if recipe.data.path and not _is_id(recipe.data.path) else ""
    return f"""{_head([recipe], tags, PIPELINES.get(_input(recipe), "feature-extraction"))}
# {recipe.data.modality} encoder, {name}

The {which} of a {name} run ({METHODS[name].paper}), {_length(step)} of {recipe.train.global_batch} samples.
Architecture: {shape}. Trained without labels{source} by mmssl.{together}

```python
from transformers import AutoModel, {loader}
model = AutoModel.from_pretrained("PATH"{trust}
prepare = {loader}.from_pretrained("PATH")
features = model(**prepare({given}, return_tensors="pt")){pooled}
```
{_table(metrics)}{_licence([recipe])}
## Recipe

```yaml
{shown(recipe.dump())}```
"""
