"""A gallery's rows are those of a full sort in float64, and its picture says what it shows."""

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from selfsup_xbn.data import ImageData, Split, load_data
from selfsup_xbn.evaluation.evaluators import RetrievalEvaluator
from selfsup_xbn.models.encoder import build_encoder
from selfsup_xbn.report.gallery import draw_gallery, nearest_images


def split(labels):
    return Split(labels, images=torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("with_gallery", [False, True])
def test_gallery_rows_equal_a_full_sort_hardest_first(with_gallery):
    labels, gallery_labels = torch.randint(4, (40,)), torch.randint(4, (30,))
    queries, gallery = torch.randn(40, 6), torch.randn(30, 6)
    data = ImageData("x", split(labels), split(labels), split(gallery_labels) if with_gallery else None)
    rows = nearest_images([queries, gallery] if with_gallery else [queries], data, rows=8, nearest=3)
    bank, bank_labels = (gallery, gallery_labels) if with_gallery else (queries, labels)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None].double(), bank[None].double(), dim=2)
    if not with_gallery:
        cosine.fill_diagonal_(-2)
    leads = []
    for query in range(40):
        same = bank_labels == labels[query]
        leads.append(float(cosine[query][~same].max() - cosine[query][same].max()))
    assert [row.query for row in rows[:4]] == sorted(range(40), key=lambda query: -leads[query])[:4]
    assert len({row.query for row in rows}) == 8
    for row in rows:
        assert row.nearest == sorted(range(len(bank)), key=lambda other: -cosine[row.query, other])[:3]
        assert row.right == [bool(bank_labels[other] == labels[row.query]) for other in row.nearest]


def test_the_picture_marks_the_queries_and_says_their_order(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    data = load_data("digits")
    draw_gallery(tmp_path, RetrievalEvaluator(data), build_encoder("convnet4", 16, channels=1, image_size=8), rows=4)
    (figure,) = figures
    figure.draw_without_rendering()
    assert "left column (blue): queries, hardest first" in figure.get_suptitle()
    columns = 6
    assert len(figure.axes) == 4 * columns
    for number, axes in enumerate(figure.axes):
        edges = {to_hex(side.get_edgecolor()) for side in axes.spines.values()}
        named = {to_hex(color) for color in (["tab:green", "tab:red"] if number % columns else ["tab:blue"])}
        assert edges <= named
    caption = figure._suptitle.get_window_extent()
    assert caption.x0 >= 0
    assert caption.x1 <= figure.bbox.x1
