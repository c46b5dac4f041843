from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mmssl.errors import RecipeError
from mmssl.evaluate import protocols as module
from mmssl.evaluate.knn import Knn
from mmssl.evaluate.linear import Heads, Linear, Logistic
from mmssl.evaluate.protocols import PROTOCOLS, choose, measure

CLASSES = 3


def rows(n: int, seed: int, noise: float = 0.5):
    """Features of three classes whose last column is the sample's index, three layers of cls tokens, and three tokens."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % CLASSES
    means = 2 * torch.eye(CLASSES, 8)[label]
    embedding = means + noise * torch.randn(n, 8, generator=draw)
    cls = torch.stack([noise * torch.randn(n, 8, generator=draw), embedding, -embedding], 1)
    found = {"embedding": embedding, "cls": cls, "label": label, "index": 100 + torch.randperm(n, generator=draw)}
    return found | {"tokens": cls, "attend": torch.ones(n, 3, dtype=torch.bool)}


def test_every_protocol_learns_what_can_be_separated():
    chosen = {n: replace(p, epochs=min(p.epochs, 40)) if isinstance(p, Linear) else p for n, p in PROTOCOLS.items()}
    for name in ("simsiam", "mae-linear"):  # LARS goes a small share of its length at a time, and 60 samples are one batch
        chosen[name] = replace(chosen[name], batch=4, lr=(400.0,))
    chosen["attentive"] = replace(chosen["attentive"], batch=4, lr=1e-2)
    found = measure(chosen, rows(60, 0), rows(30, 1), CLASSES)
    assert [*found] == [*PROTOCOLS]
    assert {name: result["accuracy"] for name, result in found.items() if result["accuracy"] < 0.9} == {}


def test_names_come_one_by_one_or_as_a_list_and_unknown_ones_are_told_the_nearest():
    assert [*choose("moco, grid")] == [*choose(["moco", "grid"])] == ["moco", "grid"]
    assert choose("moco") == {"moco": PROTOCOLS["moco"]}
    assert choose("knn", 7) == {"knn": Knn((7,))}
    with pytest.raises(RecipeError, match=r"^protocol: 'barlw' is unknown \(did you mean barlow\?\)"):
        choose("knn,barlw")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, "^epochs: 0, must be at least 1"),
        ({"batch": -2}, "^batch: -2, must be at least 1"),
        ({"lr": 0.0}, "^lr: 0.0, must be above 0"),
        ({"lr": float("nan")}, "^lr: nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, text):
    with pytest.raises(RecipeError, match=text):
        choose("moco", **changes)


def test_a_setting_that_no_protocol_takes_is_refused():
    with pytest.raises(RecipeError, match=r"^epochs: none of knn, simclr-lbfgs trains with it"):
        choose("knn,simclr-lbfgs", epochs=3)


def test_what_was_changed_is_told():
    chosen = choose("byol,knn", epochs=2, lr=0.25, augment=False)
    assert chosen["byol"] == replace(PROTOCOLS["byol"], epochs=2, lr=(0.25,), augment=False)
    found = measure(chosen, rows(30, 0), rows(9, 1), CLASSES)
    assert found["byol"]["overridden"] == {"epochs": 80, "lr": (0.4, 0.3, 0.2, 0.1, 0.05), "augment": True}
    assert (found["byol"]["lr"], found["byol"]["epochs"], found["byol"]["augment"]) == (0.25, 2, False)
    assert "overridden" not in found["knn"]
    assert "overridden" not in measure(choose("moco"), rows(30, 0), rows(9, 1), CLASSES)["moco"]


def test_the_best_number_of_neighbours_is_reported_with_all():
    bank, test = rows(45, 0, noise=2.0), rows(60, 1, noise=2.0)
    found = measure({"knn-dino": Knn((1, 5, 200))}, bank, test, CLASSES)["knn-dino"]
    assert [row["neighbours"] for row in found["all"]] == [1, 5, 45]
    best = max(found["all"], key=lambda row: row["accuracy"])
    assert {name: found[name] for name in best} == best
    assert found["accuracy"] > min(row["accuracy"] for row in found["all"])


BLIND = Linear((1e-9, 0.5), epochs=20, batch=20, init_std=1.0, augment=False)  # the first does not learn


@pytest.mark.parametrize("protocol", [BLIND, Logistic((1e6, 1.0, 1e-4))])
def test_test_labels_have_no_say_in_a_choice(protocol, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "grid", protocol)
    bank, test = rows(90, 0, noise=1.0), rows(60, 1, noise=1.0)
    wrong = {**test, "label": (test["label"] + 1) % CLASSES}  # the better a classifier, the worse it looks
    right = measure({"grid": protocol}, bank, test, CLASSES)["grid"]
    fooled = measure({"grid": protocol}, bank, wrong, CLASSES)["grid"]
    setting = "lr" if isinstance(protocol, Linear) else "l2"
    assert (fooled[setting], fooled["held_out"]) == (right[setting], right["held_out"])
    assert right["held_out"] == max(row["held_out"] for row in right["all"]) > min(row["held_out"] for row in right["all"])
    assert fooled["accuracy"] < 0.3 < 0.7 < right["accuracy"]
    if isinstance(protocol, Linear):  # by test labels the other would have been chosen
        assert fooled["accuracy"] < max(row["accuracy"] for row in fooled["all"])


def test_what_is_held_out_is_never_learned_from_whatever_the_views(monkeypatch):
    seen, measured = [], []

    class Recorded(Heads):
        def train(self, features, labels, epoch):
            seen.append((features, labels))

        def accuracies(self, features, labels):
            measured.append((features, labels))
            return [0.0] * len(self.settings)

    monkeypatch.setattr(module, "Heads", Recorded)
    bank, test = rows(60, 0), rows(9, 1)
    bank["embedding"][:, -1] = bank["index"]

    def drawn(epoch):  # in another order, and without a sample that could not be read
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))[1:]
        return {name: tensor[order] for name, tensor in bank.items()}

    measure({"grid": replace(BLIND, epochs=2, augment=True)}, bank, test, CLASSES, drawn=drawn)
    held = next(x[:, -1] for x, _ in measured if len(x) == 6)
    for x, labels in seen:
        assert not torch.isin(x[:, -1], held).any()
        assert len(x) >= 53
        assert torch.equal(labels, bank["label"][(x[:, -1, None] == bank["index"]).long().argmax(1)])
    (labels,) = (y for x, y in measured if len(x) == 6)
    assert labels.bincount().tolist() == [2, 2, 2]


def test_views_are_drawn_once_an_epoch_for_all_and_only_where_wanted():
    bank, test, asked = rows(30, 0), rows(9, 1), []

    def drawn(epoch):
        asked.append(epoch)
        return {**bank, "embedding": bank["embedding"] + epoch}

    plain = replace(PROTOCOLS["swav"], epochs=5, augment=False)
    chosen = {"swav": replace(PROTOCOLS["swav"], epochs=3), "barlow": replace(PROTOCOLS["barlow"], epochs=2), "vicreg": plain}
    found = measure(chosen, bank, test, CLASSES, drawn=drawn)
    assert asked == [0, 1, 2]
    assert [result["augment"] for result in found.values()] == [True, True, False]
    alone = measure({"vicreg": plain}, bank, test, CLASSES, drawn=drawn)
    assert alone["vicreg"] == found["vicreg"]
    assert asked == [0, 1, 2]


def test_the_cls_tokens_of_a_protocol_are_the_last():
    bank = rows(12, 0)
    for n in (1, 2, 4):
        wanted = bank["cls"][:, 3 - min(n, 3) :].reshape(12, -1)
        assert_close(module._features(Linear((1.0,), cls_layers=n), bank), wanted)


def test_a_choice_needs_two_samples_of_a_class():
    with pytest.raises(RecipeError, match=r"^protocol: grid chooses on held-out training data.*labels=2"):
        measure(choose("grid"), rows(3, 0), rows(9, 1), CLASSES)


def test_results_depend_on_the_seed_alone():
    chosen = choose("moco,grid", epochs=2)
    bank, test = rows(60, 0, noise=2.0), rows(60, 1, noise=2.0)
    first = measure(chosen, bank, test, CLASSES, seed=1)
    assert measure(chosen, bank, test, CLASSES, seed=1) == first
    assert measure(chosen, bank, test, CLASSES, seed=2) != first
