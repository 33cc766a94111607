"""The map keeps neighbors together; the choice of images is the same for everyone."""

import pytest
import torch

from selfsup_xbn.errors import UserError
from selfsup_xbn.report.map import first_of_each, plane_of, spread_classes


def test_clusters_of_directions_are_clusters_on_the_map():
    labels = torch.arange(60) % 4
    directions = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    embeddings = (directions[labels] + 0.1 * torch.randn(60, 16)) * torch.rand(60, 1).add(0.1)  # lengths mean nothing
    plane = plane_of(embeddings)
    nearest = torch.cdist(plane, plane).fill_diagonal_(torch.inf).argmin(1)
    assert (labels[nearest] == labels).double().mean() > 0.95
    assert plane.amin(0).tolist() == [0, 0]
    assert plane[:, 0].max() == 1 >= plane[:, 1].max()
    assert torch.equal(plane, plane_of(embeddings))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dim", [1, 2])
def test_few_images_and_one_dimension_have_a_map(size, dim):
    plane = plane_of(torch.randn(size, dim))
    assert plane.shape == (size, 2)
    assert plane.isfinite().all()


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="row 2"):
        plane_of(torch.tensor([[1.0], [2.0], [torch.nan], [1.0]]))


def test_images_are_spread_over_classes_first_of_each():
    labels = torch.tensor([7, 1, 7, 9, 1, 7, 3, 3, 9, 5])
    assert spread_classes(labels, 3).tolist() == [1, 5, 9]
    assert spread_classes(labels, 99).tolist() == [1, 3, 5, 7, 9]
    chosen = first_of_each(labels, torch.tensor([7, 9, 4]), 2)
    seen: dict[int, int] = {}
    expected = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if label in (7, 9, 4) and seen[label] <= 2:
            expected.append(index)
    assert chosen.tolist() == expected
