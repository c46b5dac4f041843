"""The model card of a fine-tuned model."""

from __future__ import annotations

from typing import Any

from mmssl.config import FinetuneRecipe
from mmssl.hub.card import shown

TAGS = {"ctc": "automatic-speech-recognition", "sequence-classification": "text-classification"}  # the Hub's names of tasks
LOADERS = {"image-classification": "AutoImageProcessor", "sequence-classification": "AutoTokenizer", "ctc": "AutoProcessor"}
GIVEN = {"image-classification": "image", "sequence-classification": "text"}
READ = "model.config.id2label[int(logits.argmax())]"


def card(recipe: FinetuneRecipe, model: Any, scores: dict[str, float]) -> str:
    """Markdown: what it does, how well, the lines that load it, the recipe."""
    loader = LOADERS.get(recipe.task, "AutoFeatureExtractor")
    if recipe.task == "ctc" and model.main_input_name != "input_values":
        loader = "AutoFeatureExtractor"
    given = GIVEN.get(recipe.task, "wave, sampling_rate=16_000")
    auto = type(model).__name__ if not type(model).__name__.startswith("Mmssl") else f"AutoModel{type(model).__name__[5:]}"
    trust = (
        ", trust_remote_code=True)  # with `import mmssl` before, no remote code is needed" if auto.startswith("Auto") else ")"
    )
    read = "prepare.batch_decode(logits.argmax(-1))[0]" if loader == "AutoProcessor" else "logits.argmax(-1)"
    found = "".join(f"| `{name}` | {value:.4g} |\n" for name, value in scores.items())
    return f"""---
library_name: transformers
pipeline_tag: {TAGS.get(recipe.task, recipe.task)}
---

# {recipe.task} from an encoder pretrained without labels

Fine-tuned with mmssl ({recipe.model.tune}).

```python
from transformers import {auto}, {loader}
model = {auto}.from_pretrained("PATH"{trust}
prepare = {loader}.from_pretrained("PATH")
logits = model(**prepare({given}, return_tensors="pt")).logits
answer = {READ if recipe.task != "ctc" else read}
```

## Measured on the test split

| metric | value |
|---|---|
{found}
## Recipe

```yaml
{shown(recipe.dump())}```
"""
