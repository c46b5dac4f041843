import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch.testing import assert_close

from mmssl.parts import kmeans as module
from mmssl.parts.kmeans import draw_rows, kmeans, pca_whiten, spherical_kmeans, split_empty, uniform_order


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def test_spherical_kmeans_keeps_the_centroids_of_empty_clusters(vector):
    case = vector("spherical_kmeans")
    rows = F.normalize(torch.tensor(case["inputs"]["embeddings_to_be_L2_normalised"], dtype=torch.float64), dim=1)
    two = rows[case["inputs"]["init_K2_rows"]]
    three = torch.cat([two, torch.tensor([[0.0, 1.0]], dtype=torch.float64)])
    for start, name in ((two, "K2"), (three, "K3")):
        found = spherical_kmeans(rows, start)
        assert found.assignment.tolist() == case["expected"][f"{name}_assign"]
        assert_close(
            found.centroids, torch.tensor(case["expected"][f"{name}_centroids"], dtype=torch.float64), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("block", [1 << 22, 40])
def test_it_is_sklearns_from_the_same_start(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    rows = draw(301, 4) + 3 * draw(8, 4, seed=1).repeat_interleave(40, 0)[:301]
    start = draw_rows(rows, 8, keyed())
    for iterations in (1, 3, 50):
        wanted = KMeans(8, init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(rows.numpy())
        found = kmeans(rows, start, keyed(), iterations)
        assert_close(found.centroids, torch.from_numpy(wanted.cluster_centers_), rtol=1e-9, atol=1e-9)
        assert found.assignment.tolist() == wanted.labels_.tolist()
    loose = kmeans(rows.float(), start.float(), keyed(), 50)
    assert_close(loose.centroids, found.centroids.float(), rtol=1e-4, atol=1e-4)


def test_an_empty_cluster_takes_half_of_a_donor(vector):
    case = vector("faiss_empty_cluster_split")
    donor = torch.tensor(case["inputs"]["donor"], dtype=torch.float64)
    found = split_empty(torch.stack([torch.zeros(3).double(), donor]), torch.tensor([0.0, 9.0]), keyed())
    wanted = [case["expected"]["new_centroid"], case["expected"]["donor_after"]]
    assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_donors_are_drawn_by_size_less_one_and_halved():
    sizes, counts = torch.tensor([0.0, 1.0, 3.0, 7.0]), [0, 0, 0, 0]
    centroids = torch.eye(4)
    for seed in range(400):
        counts[int(split_empty(centroids, sizes, keyed(seed))[0].argmax())] += 1
    assert counts[:2] == [0, 0]
    assert counts[2] / 400 == pytest.approx(2 / 8, abs=0.07)
    for seed in range(20):  # the first donor is halved to 1 or less, so that the other one gives next
        first, second = split_empty(centroids, torch.tensor([0.0, 0.0, 2.0, 1.5]), keyed(seed))[:2].argmax(1).tolist()
        assert {first, second} == {2, 3}


def test_no_cluster_stays_empty_and_the_groups_are_found():
    groups = 20 * draw(5, 6) + 0.01
    rows = torch.cat([group + draw(30, 6, seed=i) / 10 for i, group in enumerate(groups)])
    start = torch.cat([rows[:1], rows.new_full((4, 6), 1e6) + torch.arange(4)[:, None]])  # all go to the first
    found = kmeans(rows, start, keyed(), 20)
    assert found.assignment.bincount(minlength=5).min() > 0
    again = kmeans(rows, start, keyed(), 20)
    assert torch.equal(found.centroids, again.centroids)


def test_starts_are_different_rows():
    rows = draw(7, 2)
    found = draw_rows(rows, 7, keyed())
    assert sorted(found[:, 0].tolist()) == sorted(rows[:, 0].tolist())
    assert not torch.equal(found, draw_rows(rows, 7, keyed(1)))


@pytest.mark.parametrize("count", [0, 8])
def test_more_clusters_than_samples_are_refused(count):
    rows = draw(7, 2)
    with pytest.raises(ValueError, match=rf"^clusters: {count}"):
        draw_rows(rows, count, keyed())
    with pytest.raises(ValueError, match=r"^clusters: 9"):
        kmeans(rows, draw(9, 2), keyed())


def test_whitened_components_have_mean_0_and_mean_square_1(vector):
    case = vector("pca_whitening")
    found = pca_whiten(torch.tensor(case["inputs"]["X"], dtype=torch.float64), case["inputs"]["pca_dim"])
    wanted = case["expected"]
    square = torch.tensor(wanted["mean_square_per_component_before_L2"], dtype=torch.float64)
    assert_close(found.square().mean(0), square, rtol=1e-9, atol=0)
    rows = F.normalize(found, dim=1)
    gram = torch.tensor(wanted["gram_of_normalised_rows"], dtype=torch.float64)
    assert_close(rows @ rows.T, gram, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1 << 22, 40])
def test_whitening_is_sklearns(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    rows = draw(50, 6) * torch.arange(1, 7) + 5
    wanted = torch.from_numpy(PCA(4, whiten=True).fit_transform(rows.numpy())) * (50 / 49) ** 0.5
    found = pca_whiten(rows, 4)
    assert_close(found * (found[0] * wanted[0]).sign(), wanted, rtol=1e-9, atol=1e-9)


def test_no_more_components_than_directions_are_kept():
    rows = draw(9, 3)
    rows[:, 2] = rows[:, 0] - rows[:, 1]
    for dim, kept in ((1, 1), (2, 2), (3, 2), (9, 2)):
        assert pca_whiten(rows, dim).shape == (9, kept)
    with pytest.raises(ValueError, match=r"^pca: .* alike"):
        pca_whiten(torch.ones(9, 3, dtype=torch.float64), 2)


def test_clusters_are_drawn_equally_often(vector):
    case = vector("uniform_label_sampler")
    sizes, expected = case["inputs"]["cluster_sizes"], case["expected"]
    assignment = torch.tensor([3, 0, 0, 1, 3, 0, 0, 3, 0])
    assert assignment.bincount(minlength=4).tolist() == sizes
    seen, first, most = np.zeros(9), set(), 0
    for seed in range(300):
        found = uniform_order(assignment, keyed(seed))
        assert len(found) == expected["returned"]
        labels = assignment[found].bincount(minlength=4)
        assert labels[2] == 0
        most = max(most, int(labels.max()))
        own = found[assignment[found] == 0].tolist()
        assert len({*own}) == len(own)  # five samples and four draws: without repetition
        seen += np.bincount(found.numpy(), minlength=9)
        first.add(int(found[0]))
    rate = np.array([seen[assignment == k].sum() for k in range(4)]) / 300
    assert most == expected["per_cluster"]
    # Twelve draws are cut to nine: each of the three clusters keeps three on average.
    assert rate == pytest.approx([3, 3, 0, 3], abs=0.2)
    assert first == {*range(9)}
    assert torch.equal(uniform_order(assignment, keyed(1)), uniform_order(assignment, keyed(1)))
