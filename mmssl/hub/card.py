"""The model card."""

from __future__ import annotations

from mmssl.config import Recipe


def card(recipe: Recipe, which: str, metrics: dict[str, float], step: int | None) -> str:
    """Markdown with what a reader needs to use the model: origin, training, measurements, the lines that load it."""
    from mmssl.methods import METHODS

    name = recipe.method.name  # type: ignore[attr-defined]
    rows = "".join(f"| `{key}` | {value:.4g} |\n" for key, value in sorted(metrics.items()))
    table = f"\n## Last measured\n\n| metric | value |\n|---|---|\n{rows}" if rows else ""
    length = f"{step} updates" if step else "an unknown number of updates"
    return f"""---
library_name: transformers
tags: [self-supervised, {recipe.data.modality}, {name}]
---

# {recipe.data.modality} encoder, {name}

The {which} of a {name} run ({METHODS[name].paper}), {length} of {recipe.train.global_batch} samples.
Trained without labels by mmssl.

```python
from transformers import AutoModel, AutoImageProcessor
model = AutoModel.from_pretrained("PATH", trust_remote_code=True)  # with `import mmssl` before, no remote code is needed
processor = AutoImageProcessor.from_pretrained("PATH")
features = model(**processor(image, return_tensors="pt")).pooler_output
```
{table}
## Recipe

```yaml
{recipe.dump()}```
"""
