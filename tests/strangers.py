"""A process on a machine that has torch and transformers only."""

import os
import subprocess
import sys

# What a stranger's machine lacks cannot be found there either: the finder says so instead of finding.
LACKING = """
import importlib.abc, sys
LACKS = {"mmssl", "modalities", "pydantic", "datasets", "deepspeed", "accelerate", "torchvision", "torchaudio", "PIL",
         "sklearn", "soundfile", "sentencepiece", "matplotlib"}
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKS:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Lacking())
import importlib.util
find = importlib.util.find_spec  # transformers asks it what is installed
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in LACKS else find(name, package)
import torch
"""
STRANGER = (
    LACKING
    + """
from transformers import AutoModel
torch.set_num_threads(1)  # as in the tests, so that sums have the same order
for folder, given, found in zip(*[iter(sys.argv[1:])] * 3):
    model, outs = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), []
    for inputs in torch.load(given, weights_only=True):
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        outs.append([out.last_hidden_state, out.pooler_output, *out.hidden_states])
    torch.save(outs, found)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not LACKS & {name.split(".")[0] for name in sys.modules}
"""
)


def start(folder, code, *arguments):
    """A fresh process in an empty folder, without network."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, cwd=folder, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
