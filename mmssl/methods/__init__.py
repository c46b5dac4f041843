"""One file for each paper."""

from mmssl.methods.data2vec1 import Data2Vec1
from mmssl.methods.data2vec2 import Data2Vec2
from mmssl.methods.method import Method

METHODS: dict[str, type[Method]] = {"data2vec1": Data2Vec1, "data2vec2": Data2Vec2}

__all__ = ["METHODS", "Method"]
