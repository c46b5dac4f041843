"""State that something else than the optimizer changes, and what copies it."""

from mmssl.parts.center import Center
from mmssl.parts.magnitude import Magnitude
from mmssl.parts.memory import Memory
from mmssl.parts.network import Network
from mmssl.parts.part import Part
from mmssl.parts.prototypes import DinoHead, Prototypes
from mmssl.parts.queue import Queue
from mmssl.parts.teacher import Teacher

__all__ = ["Center", "DinoHead", "Magnitude", "Memory", "Network", "Part", "Prototypes", "Queue", "Teacher"]
