from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsup_xbn.errors import UserError
from selfsup_xbn.evaluation import neighbors
from selfsup_xbn.evaluation.neighbors import CHUNK, normalize_features, similarity_blocks, top_k


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    k=st.integers(1, 40),
    groups=st.integers(2, 12),
    levels=st.sampled_from([3, 50, 10_000]),
    seed=st.integers(0, 10_000),
)
def test_top_k_finds_what_a_full_sort_finds_ties_included(rows, columns, k, groups, levels, seed):
    values = torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    k = min(k, columns)
    found = top_k(values, k, groups)
    assert torch.equal(found.values.sort(dim=1).values, values.sort(dim=1).values[:, -k:])
    assert torch.equal(values.gather(1, found.columns), found.values)
    assert all(len(row.unique()) == k for row in found.columns)


def test_top_k_handles_rows_of_minus_infinity():
    values = torch.full((2, 100), -torch.inf)
    values[0, 37] = 1.0
    found = top_k(values, 3)
    assert found.columns[0, found.values[0].argmax()] == 37
    assert found.values[1].tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("count", [1, 2, 7, 50])
@pytest.mark.parametrize("budget", [1, 60, 200, 10_000])
def test_blocks_cover_the_product_in_order_within_the_budget(count, budget, monkeypatch):
    monkeypatch.setattr(neighbors, "BLOCK", budget)
    queries, gallery = torch.randn(count, 6), torch.randn(20, 6)
    parts = [(rows, block.clone()) for rows, block in similarity_blocks(queries, gallery)]
    assert [i for rows, _ in parts for i in range(rows.start, rows.stop)] == list(range(count))
    torch.testing.assert_close(torch.cat([block for _, block in parts]), queries @ gallery.T)
    assert all(block.numel() <= max(budget, 2 * 20) for _, block in parts)


@pytest.mark.parametrize("width", [1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 2])
def test_chunks_of_the_gallery_cover_the_whole_product(width):
    queries, gallery = torch.randn(50, 33, dtype=torch.float64), torch.randn(width, 33, dtype=torch.float64)
    (_, block), *_ = similarity_blocks(queries.float(), gallery.float())
    torch.testing.assert_close(block, (queries @ gallery.T).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [CHUNK, CHUNK + 1, 2 * CHUNK + 2, 3 * CHUNK - 1, 5001])
def test_equal_gallery_rows_are_equally_similar_in_all_chunks(width):
    queries, row = torch.randn(100, 33), torch.randn(1, 33)
    for _, block in similarity_blocks(queries, row.expand(width, -1).clone()):
        assert torch.equal(block, block[:, :1].expand_as(block))


@pytest.mark.parametrize("count", [2, 3, 1025, 2049])
def test_no_block_has_a_single_row(count):
    blocks = list(similarity_blocks(torch.randn(count, 3), torch.randn(4, 3)))
    assert min(len(block) for _, block in blocks) > 1


def test_unit_rows_have_length_one_and_zero_rows_stay_zero():
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(normalize_features(features, "x"), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_is_named(bad):
    features = torch.randn(5, 3)
    features[3, 1] = bad
    with pytest.raises(UserError, match=r"^bank: expected rows with a finite norm, got norm \w+ in row 3; [^\n]*$"):
        normalize_features(features, "bank")
