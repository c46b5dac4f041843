import json
from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[1] / "vectors" / "joint-embedding.json"


@pytest.fixture(scope="session")
def vector():
    """Function: name of a case -> its inputs and expected outputs."""
    cases = json.loads(VECTORS.read_text())["cases"]
    return cases.__getitem__
