"""make demo: train on images for a few minutes, then compare raw pixels, a random and the trained encoder.

python tools/demo.py [FOLDER] [SEED]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/demo")
    seed = sys.argv[2] if len(sys.argv) > 2 else "0"
    data = Path("demo-data")
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_demo_data.py"), str(data)], check=True)
    from mmssl.cli import main as mmssl
    from mmssl.cli.probe import table
    from mmssl.evaluate.probe import probe

    start = time.monotonic()
    run = folder / "vision"
    words = ["vision/data2vec2-demo", f"data={data}/vision", f"out={run}", f"train.seed={seed}", "overwrite=true"]
    code = mmssl(["pretrain", *words])
    if code:
        sys.exit(code)
    scores = probe(run / "model", f"{data}/vision", random=True)
    scores["pretrained"] = scores.pop("model")
    (folder / "summary.json").write_text(json.dumps({"vision": scores}, indent=2) + "\n")
    print(f"\ntrained in {time.monotonic() - start:.0f} s on images without their labels; accuracy on held-out images:\n")
    names = {"raw": "raw pixels", "random": "random init", "pretrained": "pretrained"}
    print(table({names[name]: value for name, value in scores.items()}))


if __name__ == "__main__":
    main()
