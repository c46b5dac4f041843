"""State that something else than the optimizer changes, and what copies it."""

from mmssl.parts.network import Network
from mmssl.parts.part import Part
from mmssl.parts.teacher import Teacher

__all__ = ["Network", "Part", "Teacher"]
