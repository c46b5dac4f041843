"""Load exported models where only torch and transformers are installed: `python fresh_load.py JOBS`, by tools/fresh_export.py.

JOBS is JSON, an object for each model: `folder`; `inputs`, a file of tensors by keyword; `found`, the file to write.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModel

STRANGERS = ("mmssl", "modalities", "datasets", "deepspeed", "accelerate", "torchvision", "torchaudio")


def main() -> None:
    here = [name for name in STRANGERS if importlib.util.find_spec(name)]
    if here:
        sys.exit(f"not a fresh environment: {', '.join(here)} can be imported")
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        try:
            code = (Path(job["folder"]) / "modeling_mmssl.py").exists()
            model = AutoModel.from_pretrained(job["folder"], trust_remote_code=code).eval()
            with torch.no_grad():
                out = model(**torch.load(job["inputs"], weights_only=True), **job["options"])
            torch.save({"last": out.last_hidden_state, "class": type(model).__name__}, job["found"])
        except Exception:  # whatever it is, the others are tried
            torch.save({"error": traceback.format_exc()[-1500:]}, job["found"])


if __name__ == "__main__":
    main()
