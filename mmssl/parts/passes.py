"""One pass of an encoder for several methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mmssl.model.encoder import Encoder
from mmssl.model.norm import is_batch_norm


class Passes:
    """What was computed, by the very tensors of which it was; equal ones do not count."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def once(self, make: Callable[..., Any], *of: Any) -> Any:
        """`make(*of)`, of the same arguments once."""
        made = self.get(make, *of)
        return self.put(make(*of), make, *of) if made is None else made

    def get(self, what: Any, *of: Any) -> Any:
        """What is known of them under that name; None if nothing is."""
        return self.found.get(_key(what, of), (None,))[0]

    def put(self, made: Any, what: Any, *of: Any) -> Any:
        """Remember it, together with its arguments, so that nothing else can take their identity."""
        self.found[_key(what, of)] = (made, of)
        return made


def _key(what: Any, of: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is computed without gradient is of no use to who needs one."""
    return what, torch.is_grad_enabled(), *(one if isinstance(one, str) else id(one) for one in of)


@contextmanager
def shared_passes(*encoders: Encoder) -> Iterator[None]:
    """Within, these encoders compute once what they are asked for again: features and tokens of a view and mask, and pooled
    embeddings, whether views come together or one by one. Nothing is kept afterwards.

    Encoders with batch normalisation are left out: what comes together decides their statistics.
    """
    shared = [one for one in dict.fromkeys(encoders) if not any(is_batch_norm(module) for module in one.modules())]
    try:
        for one in shared:
            one.passes = Passes()
        yield
    finally:
        for one in shared:
            one.passes = None
