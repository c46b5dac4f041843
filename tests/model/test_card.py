"""What a card tells others, and what it keeps to itself."""

import pytest
import yaml

from mmssl.hub import card as cards
from mmssl.hub.card import card, origin, shown


@pytest.fixture(autouse=True)
def _forget():
    origin.cache_clear()


def head(text):
    return yaml.safe_load(text.split("---")[1])


def test_a_card_names_the_data_and_not_their_place(tiny_recipe, image_folder, tmp_path):
    text = card(tiny_recipe(), "student", {}, 2)
    assert str(image_folder.parent) not in text
    assert str(tmp_path) not in text
    assert f"path: {image_folder.name}" in text
    assert f"Trained without labels on {image_folder.name} by mmssl" in text
    told = head(text)
    assert told["pipeline_tag"] == "image-feature-extraction"
    assert "base_model" not in told
    assert "license" not in told
    assert "## Licence" not in text


def test_names_on_the_hub_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "scans").mkdir(parents=True)
    given = {"a": "lab/scans", "b": "mine/scans", "c": "~/x/scans", "d": "a/b/c.csv", "e": ["https://x.org/a.tar", "one / two"]}
    kept = yaml.safe_load(shown(yaml.safe_dump(given)))
    assert kept == {"a": "lab/scans", "b": "scans", "c": "scans", "d": "c.csv", "e": ["https://x.org/a.tar", "one / two"]}


def test_a_model_inherits_base_and_licence_and_warns(tiny_recipe, monkeypatch, tmp_path, capsys):
    asked = []

    def load(where):
        asked.append(str(where))
        return cards.ModelCard("---\nlicense: cc-by-nc-4.0\nbase_model: elsewhere/first\n---\n# Theirs\n")

    monkeypatch.setattr(cards.ModelCard, "load", staticmethod(load))
    recipe = tiny_recipe()
    began = lambda init: recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": init})})  # noqa: E731
    text = card(began("lab/released"), "student", {}, 2)
    assert {"base_model": "lab/released", "license": "cc-by-nc-4.0"}.items() <= head(text).items()
    assert "* lab/released: cc-by-nc-4.0" in text
    assert "inherits cc-by-nc-4.0 from lab/released; check its terms" in capsys.readouterr().err
    card(began("lab/released"), "student", {}, 3)
    assert (len(asked), capsys.readouterr().err) == (1, "")  # once a run
    text = card(began(str(tmp_path)), "student", {}, 2)  # of a folder: what its own card says
    assert {"base_model": "elsewhere/first", "license": "cc-by-nc-4.0"}.items() <= head(text).items()
    assert str(tmp_path) not in text


def test_a_licence_that_cannot_be_read_is_said_to_be_unknown(tiny_recipe, monkeypatch, capsys):
    def load(where):
        raise OSError("no network")

    monkeypatch.setattr(cards.ModelCard, "load", staticmethod(load))
    recipe = tiny_recipe()
    text = card(recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": "lab/released"})}), "student", {}, 2)
    assert head(text)["base_model"] == "lab/released"
    assert "license" not in head(text)
    assert "* lab/released: unknown; look it up" in text
    assert "an unknown licence" in capsys.readouterr().err
