"""`python -m mmssl VERB` and `accelerate launch -m mmssl VERB`."""

from mmssl.cli import main

if __name__ == "__main__":  # workers started by spawn import this file again
    raise SystemExit(main())
