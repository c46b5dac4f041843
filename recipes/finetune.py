"""Fine-tune as a recipe says, on one process or many.

accelerate launch recipes/finetune.py RECIPE model=MODEL data=LABELLED [key=value ...]
"""

import sys

from mmssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
