"""What three processes compute together, against one process that has the whole batch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import MarginLoss
from torch import distributed as dist
from torch import nn

from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.errors import UserError
from selfsup_xbn.losses import PairMargin, functional, info_nce, nt_xent, sup_con
from selfsup_xbn.memory import FeatureQueue
from selfsup_xbn.memory.sharding import ShardedQueue
from selfsup_xbn.methods.metric_learning import MetricLearning, SupCon
from selfsup_xbn.methods.moco import MoCo
from selfsup_xbn.methods.pml_loss import PmlLoss
from selfsup_xbn.models.encoder import Encoder
from selfsup_xbn.training.agreement import on_first
from selfsup_xbn.training.data_parallel import GradientSum
from selfsup_xbn.training.renewal import Renewal
from selfsup_xbn.utils import distributed
from selfsup_xbn.utils.distributed import all_sum, shard_slice, sum_of_shares
from tests.process_group import run_in_group

PROCESSES, B, D, CLASSES = 3, 16, 8, 4
MINER = PairMargin(0.1, 1.3)


def network():
    torch.manual_seed(1)
    return Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh()), nn.Linear(16, D), 16, D).double()


def make_queue(labels=False):
    torch.manual_seed(2)
    queue = FeatureQueue(40, D, "xbn", labels=labels, dtype=torch.float64)
    for _ in range(3):
        rows = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=1)
        queue.adapt(rows)
        queue.enqueue(rows, *([torch.randint(CLASSES, (B,))] if labels else []))
    return queue


def data():
    torch.manual_seed(3)
    return torch.randn(2, B, 3, 2, 2, dtype=torch.float64).unbind(), torch.arange(B) % CLASSES


def alone(function, monkeypatch=pytest.MonkeyPatch):
    """Return what a function computes in one process that has the whole batch."""
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        return function()


def step(method, head_stage=False, compression="none", parts=1):
    """Return the loss and the summed gradients of a step in which this process has its shard of the views."""
    views, labels = data()
    own = tuple(view[shard_slice(B)] for view in views)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    gradients = GradientSum(method, method.encoder.head.parameters() if head_stage else trained, compression)
    loss = gradients.backward(lambda: (method.head_loss if head_stage else method)(own, labels))
    return loss.detach(), [parameter.grad for parameter in trained]


def equals_one_process(make, tolerance=1e-9, **options):
    together, apart = make(), make()
    loss, gradients = step(together, **options)
    expected_loss, expected = alone(lambda: step(apart, options.get("head_stage", False)))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            assert (gradient - other).norm() <= tolerance * other.norm() + 1e-12
    for name, value in together.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name], rtol=1e-9, atol=1e-12)


def rows_are_shuffled_as_in_one_process(rank):
    for total in (16, 7):
        batch, order = torch.arange(total * 3.0).view(total, 3), torch.randperm(total)
        own = shard_slice(total)
        assert torch.equal(distributed.shuffle(batch[own], order), batch[order[own]])


def losses_are_sums_of_shares(rank):
    queue, labels = make_queue(labels=True), torch.arange(B) % CLASSES
    own = shard_slice(B)
    whole = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    slots = queue.enqueue(F.normalize(whole, dim=1), labels)
    for loss, miner in ((sup_con, None), (sup_con, MINER), (nt_xent, None), (nt_xent, MINER)):
        expected = loss(whole, labels, queue, miner=miner, self_indices=slots)
        share = loss(whole[own], labels[own], queue, miner=miner, self_indices=slots[own], sum_counts=all_sum)
        assert expected > 0
        torch.testing.assert_close(sum_of_shares(share), expected)
        (gradient,), (expected_gradient,) = torch.autograd.grad(share, whole), torch.autograd.grad(expected, whole)
        torch.testing.assert_close(all_sum(gradient), expected_gradient)


def supervised_steps_equal_one_process(rank):
    def make(queue=True, **options):
        return MetricLearning(network(), make_queue(labels=True) if queue else None, SupCon(0.1, MINER), **options)

    equals_one_process(make)
    equals_one_process(lambda: make(batch_loss_weight=1.0))
    equals_one_process(lambda: make(moment_gradient=True))
    equals_one_process(lambda: make(queue=False))
    equals_one_process(make, head_stage=True)


def a_loss_with_parameters_equals_one_process(rank):
    def make(**options):
        loss = PmlLoss(MarginLoss(learn_beta=True, beta=0.9).double(), None)
        return MetricLearning(network(), make_queue(labels=True), loss, **options)

    equals_one_process(make)
    equals_one_process(lambda: make(batch_loss_weight=1.0))
    equals_one_process(lambda: make(moment_gradient=True))


def error_of_the_first_process_reaches_all(rank):
    def fails():
        raise PermissionError(13, "Permission denied", "runs/a")

    with pytest.raises(UserError, match="Permission denied: 'runs/a'"):
        on_first(fails)


def moco_steps_equal_one_process(rank):
    def make(**options):
        return MoCo(network(), make_queue(), **options)

    equals_one_process(make)
    equals_one_process(lambda: make(symmetric=True, enqueue="after_loss", normalize_first=False))


def compressed_gradients_are_near_the_sum(rank):
    def make():
        return MoCo(network(), make_queue())

    equals_one_process(make, tolerance=0.01, compression="bf16")
    equals_one_process(make, compression="powersgd")  # it compresses from step 1000 on


def each_process_scores_its_own_anchors(rank):
    anchors = []
    loss = SupCon(0.1, MINER)
    with pytest.MonkeyPatch.context() as patch:
        for module, function in (("metric_learning", sup_con), ("moco", info_nce)):

            def counted(embeddings, *args, function=function, **options):
                anchors.append(len(embeddings))
                return function(embeddings, *args, **options)

            patch.setattr(f"selfsup_xbn.methods.{module}.{function.__name__}", counted)
        step(MetricLearning(network(), make_queue(labels=True), loss))
        step(MoCo(network(), make_queue()))
    own = shard_slice(B)
    assert anchors == [own.stop - own.start] * 2


def sharded_queue_equals_the_whole_queue(rank):
    labels = torch.arange(7) % CLASSES
    whole, sharded = (kind(26, D, "axbn", labels=True) for kind in (FeatureQueue, ShardedQueue))
    for number in range(13):  # three passes, with a refresh and a skipped batch
        batch = torch.randn(7, D) * (1 + number) + number
        if number == 6:
            batch[3, 2] = torch.nan
        for queue in (whole, sharded):
            queue.adapt(batch)
        slots, own_slots = whole.enqueue(batch, labels), sharded.enqueue(batch, labels)
        held = (slots >= sharded.first) & (slots < sharded.first + sharded.size)
        assert torch.equal(own_slots, torch.where(held, slots - sharded.first, -1))
        own = slice(sharded.first, sharded.first + len(sharded))
        torch.testing.assert_close(sharded.features(), whole.features()[own], rtol=1e-5, atol=1e-5)
        for moments, expected in zip(sharded.moments(), whole.moments(), strict=True):
            torch.testing.assert_close(moments, expected)
    assert whole.skipped == sharded.skipped == 1
    state = sharded.state_dict()
    if rank == 0:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
    other = ShardedQueue(26, D, "axbn", labels=True)
    other.load_state_dict(whole.state_dict())
    torch.testing.assert_close(other.features(), whole.features()[own], rtol=0, atol=0)
    if rank == 0:
        assert torch.equal(other.labels, whole.labels[own])


def losses_over_a_sharded_queue_equal_those_over_the_whole(rank):
    labels = torch.arange(7) % CLASSES
    for filled in (1, 5):
        queues = [kind(26, D, "xbn", labels=True, dtype=torch.float64) for kind in (FeatureQueue, ShardedQueue)]
        for _ in range(filled):
            z = F.normalize(torch.randn(7, D, dtype=torch.float64), dim=1)
            both_slots = [(queue.adapt(z), queue.enqueue(z, labels))[1] for queue in queues]
        losses = {"info_nce": (z.clone(),), "sup_con": (labels,), "nt_xent": (labels,)}
        for name, temperature, implementation in (
            ("info_nce", 0.1, "blockwise"),
            ("info_nce", 0.01, "dense"),
            ("sup_con", 0.1, "blockwise"),
            ("sup_con", 0.01, "blockwise"),
            ("nt_xent", 0.1, "blockwise"),
            ("nt_xent", 0.01, "dense"),
        ):
            results = []
            for queue, slots in zip(queues, both_slots, strict=True):
                anchors = z.clone().requires_grad_()
                options = {"temperature": temperature, "self_indices": slots, "implementation": implementation}
                loss = getattr(functional, name)(anchors, *losses[name], queue, **options)
                loss.backward()
                results.append((loss.detach(), anchors.grad))
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def micro_batches_of_moco_equal_the_whole_batch(rank):
    def gradients(method, parts):
        views, labels = data()
        rows = torch.arange(B).view(parts, -1)[:, shard_slice(B // parts)]
        micro = [(tuple(view[own] for view in views), labels[: B // parts]) for own in rows]
        accumulated = GradientSum(method, [p for p in method.parameters() if p.requires_grad])
        losses = method.losses(micro, 0, 1) if parts > 1 else iter([method(*micro[0])])
        for number in range(parts):
            accumulated.backward(lambda: next(losses), last=number == parts - 1)
        return [p.grad for p in method.parameters() if p.requires_grad] + [*method.queue.buffers()]

    for options in ({}, {"symmetric": True, "enqueue": "after_loss"}):
        whole, parts = (gradients(MoCo(network(), make_queue(), **options), parts) for parts in (1, 2))
        for value, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)


def renewed_rows_equal_those_of_one_process(rank):
    def renewed():
        config = replace(RECIPES["digits-disjoint"], batch_size=B, images_per_class=4, renew=5)
        method, images = MetricLearning(network(), make_queue(labels=True), SupCon(0.1, MINER)), data()[0][0]
        renewal = Renewal(config, method, lambda index, *seed: images[index][shard_slice(len(index))])
        renewal.rows.images.copy_(torch.arange(40) % B)
        renewal.renew(0, 4, 4)
        return method.queue.features(), renewal.rows.recorded_at

    (rows, times), (expected, expected_times) = renewed(), alone(renewed)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(times, expected_times)
    assert (times > 0).sum() == 20  # 5 a step, each fourth step


CHECKS = [
    renewed_rows_equal_those_of_one_process,
    rows_are_shuffled_as_in_one_process,
    losses_are_sums_of_shares,
    supervised_steps_equal_one_process,
    a_loss_with_parameters_equals_one_process,
    error_of_the_first_process_reaches_all,
    moco_steps_equal_one_process,
    compressed_gradients_are_near_the_sum,
    each_process_scores_its_own_anchors,
    sharded_queue_equals_the_whole_queue,
    losses_over_a_sharded_queue_equal_those_over_the_whole,
    micro_batches_of_moco_equal_the_whole_batch,
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return run_in_group(tmp_path_factory.mktemp("group"), PROCESSES, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.slow
def test_three_processes(check, errors):
    assert errors[check.__name__] == ""
