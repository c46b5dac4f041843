"""Several methods as one, each for its own kind of data."""

from __future__ import annotations

from mmssl.methods.several import Several


class Joint(Several):
    """Members are built on encoders that share a trunk, which is named after the first."""
