"""What a teacher copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmssl.model.encoder import Encoder
from mmssl.model.recompute import twice
from mmssl.parts.passes import Passes
from mmssl.types import View


class Network(nn.Module):
    """Names modules: an encoder and, for joint-embedding methods, its heads. The teacher has the same names.

    What passes together shares batch statistics: `embed_all` and `project_all` where a paper concatenates views, `embed` and
    `project` for each view where it does not.
    """

    encoder: Encoder
    at_once: int | None = None  # rows that are embedded together; all of them if None, see `embed_in_parts`

    def __init__(self, encoder: Encoder, **heads: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.heads = tuple(heads)
        for name, head in heads.items():
            self.add_module(name, head)

    def embed(self, view: View) -> Tensor:
        """(B, D): what is evaluated."""
        (h,) = self.embed_all([view])
        return h

    def embed_all(self, views: Sequence[View]) -> list[Tensor]:
        """(B, D) for each view; views of one size in one pass."""
        known = self.encoder.passes or Passes()
        found = [known.get("embedding", view.x, view.pad) for view in views]
        missing = [i for i, h in enumerate(found) if h is None]
        for size in dict.fromkeys(views[i].x.shape[1:] for i in missing):
            places = [i for i in missing if views[i].x.shape[1:] == size]
            both = self._embed(_together([views[i] for i in places]))
            for i, h in zip(places, both.chunk(len(places))):
                found[i] = known.put(h, "embedding", views[i].x, views[i].pad)
        return found

    def _embed(self, view: View) -> Tensor:
        """(R, D). Of one part after the other, each of which is computed again in the backward pass, if there are several."""
        rows = self.at_once or len(view.x)
        if len(view.x) <= rows:
            return self._pool(view)
        parts = view.x.split(rows)
        pads = [None] * len(parts) if view.pad is None else view.pad.split(rows)
        pool = twice(self._pool)
        return torch.cat([pool(view._replace(x=x, pad=pad)) for x, pad in zip(parts, pads, strict=True)])

    def _pool(self, view: View) -> Tensor:
        return self.encoder.pool(self.encoder(view))

    def project(self, h: Tensor) -> Tensor:
        """(B, D) through the heads in the order they were named."""
        for name in self.heads:
            h = getattr(self, name)(h)
        return h

    def project_all(self, h: Sequence[Tensor]) -> list[Tensor]:
        """Several (B, D) in one pass."""
        return list(self.project(torch.cat([*h])).split([len(one) for one in h]))


def _together(views: Sequence[View]) -> View:
    """Views of one size below each other, without masks."""
    if len(views) == 1:
        return views[0]._replace(mask=None)
    some = next((view.pad for view in views if view.pad is not None), None)
    pad = None if some is None else torch.cat([torch.zeros_like(some) if v.pad is None else v.pad for v in views])
    return View(torch.cat([view.x for view in views]), views[0].modality, pad)
