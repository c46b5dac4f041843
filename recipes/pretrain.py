"""Train as a recipe says, on one process or many.

accelerate launch recipes/pretrain.py RECIPE [key=value ...]
"""

import sys

from mmssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
