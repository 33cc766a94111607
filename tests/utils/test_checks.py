"""Lists and arrays where a tensor is expected are refused by name, in every public function of tensors."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss

from selfsup_xbn import CrossBatchMemory, FeatureQueue, info_nce
from selfsup_xbn.evaluation import knn_classify, recall_at_k
from selfsup_xbn.losses import nt_xent, sup_con

Z, LABELS = torch.eye(4)[:2], torch.tensor([0, 1])
ROWS = Z.tolist()


def queue():
    return FeatureQueue(4, 4, "xbn", labels=True)


CASES = {
    "embeddings, got a list": lambda: info_nce(ROWS, Z, queue()),
    "k, got a ndarray": lambda: info_nce(Z, Z.numpy(), queue()),
    "self_indices, got a list": lambda: info_nce(Z, Z, queue(), self_indices=[0, 1]),
    "labels, got a list": lambda: sup_con(Z, [0, 1], queue()),
    "labels, got a ndarray": lambda: nt_xent(Z, np.array([0, 1]), queue()),
    "batch, got a list": lambda: queue().adapt(ROWS),
    "batch, got a ndarray": lambda: queue().enqueue(Z.numpy(), LABELS),
    "labels, got a tuple": lambda: queue().enqueue(Z, (0, 1)),
    "embeddings, got a ndarray": lambda: CrossBatchMemory(ContrastiveLoss(), 4, 8)(Z.numpy(), LABELS),
    "bank, got a list": lambda: knn_classify(Z, ROWS, LABELS, num_classes=2, k=1),
    "gallery_labels, got a list": lambda: recall_at_k(Z, LABELS, Z, [0, 1]),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", CASES)
def test_what_is_no_tensor_is_refused_by_name(message):
    with pytest.raises(TypeError, match=f"expected a tensor as {message}"):
        CASES[message]()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", [info_nce, sup_con, nt_xent])
def test_a_tensor_in_place_of_the_queue_is_refused(loss):
    with pytest.raises(TypeError, match="expected a FeatureQueue as queue, got a Tensor"):
        loss(Z, Z if loss is info_nce else LABELS, Z)
