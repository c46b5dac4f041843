"""Data that is divided, and what is told of going on with the other half."""

import datasets

from mmssl.config import shipped_recipes
from tools.halves import EARLY, KINDS, divide, table


def test_each_row_is_in_one_half_by_its_column(tmp_path):
    names = datasets.ClassLabel(names=[*"abcdefghij"])
    features = datasets.Features({"label": names, "row": datasets.Value("int64")})
    for split, count in (("train", 40), ("test", 10)):
        rows = {"label": [i % 10 for i in range(count)], "row": [*range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    divide(tmp_path, KINDS["vision"], tmp_path / "halves")
    for split, count in (("train", 40), ("test", 10)):
        halves = [datasets.Dataset.from_parquet(f"{tmp_path}/halves/{half}/{split}.parquet") for half in ("first", "second")]
        assert [{*half["label"]} for half in halves] == [{0, 1, 2, 3, 4}, {5, 6, 7, 8, 9}]
        assert sorted([*halves[0]["row"], *halves[1]["row"]]) == [*range(count)]
        assert halves[1].features["label"] == names  # classes keep their names


def test_the_table_has_a_row_for_each_model():
    scores = {"before": {"knn": 0.4, "linear": 0.5}, f"heads first, {EARLY[0]} updates": {"knn": 0.395, "linear": 0.503}}
    lines = table({"vision": scores, "text": scores}).splitlines()
    assert lines[0] == "|  | vision k-NN | vision linear | text k-NN | text linear |"
    assert lines[2:] == ["| before | 40.0 | 50.0 | 40.0 | 50.0 |", "| heads first, 50 updates | 39.5 | 50.3 | 39.5 | 50.3 |"]


def test_recipes_of_halves_ship():
    assert {kind.recipe for kind in KINDS.values()} <= {*shipped_recipes()}
    assert all(kind.first for kind in KINDS.values())
