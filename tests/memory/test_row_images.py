"""Image numbers of rows, renewal and drift residual, against lists and against a queue without adaptation."""

import torch
import torch.nn.functional as F

from selfsup_xbn import FeatureQueue
from selfsup_xbn.memory.row_images import RowImages

M, D, B = 12, 3, 5


def steps(count, adaptation="xbn", sample=0, dtype=torch.float64):
    """Yield queue, images, a queue without adaptation, and by slot the image number and the time of its embedding."""
    queue, plain = (FeatureQueue(M, D, kind, dtype=dtype) for kind in (adaptation, "xbm"))
    images, numbers, times = RowImages(queue, sample), [-1] * M, [0] * M
    for step in range(count):
        batch, index = torch.randn(B, D, dtype=dtype) + step, torch.randint(100, (B,))
        queue.adapt(batch)
        queue.enqueue(batch)
        plain.enqueue(batch)
        images.record(index)
        for row, number in enumerate(index.tolist()):
            slot = (step * B + row) % M
            numbers[slot], times[slot] = number, (step + 1) * B
        yield queue, images, plain, numbers, times


def test_each_row_has_the_number_of_its_image():
    for _, images, _, numbers, times in steps(9):
        assert images.images.tolist() == numbers
        filled = [time for time in times if time]
        assert [time for time in images.recorded_at.tolist() if time] == filled


def test_a_skipped_batch_is_not_recorded():
    *_, (queue, images, _, numbers, _) = steps(4)
    batch = torch.full((B, D), torch.nan, dtype=torch.float64)
    queue.enqueue(batch)
    images.record(torch.full((B,), 77))
    assert images.images.tolist() == numbers


def test_the_last_rows_of_a_batch_above_the_queue_are_recorded():
    queue = FeatureQueue(3, 2, "xbm")
    images = RowImages(queue)
    queue.enqueue(torch.randn(5, 2))
    images.record(torch.arange(5))
    assert images.images.tolist() == [2, 3, 4]


def test_stalest_rows_have_the_largest_gain():
    for step, (_, images, _, _, times) in enumerate(steps(9), start=1):
        written = step * B
        gains = {
            slot: (written - time) * ((slot - written) % M)
            for slot, time in enumerate(times)
            if time  # rows of age 0 gain nothing
        }
        chosen = images.stalest(3).tolist()
        expected = sorted(gains, key=lambda slot: (-gains[slot], slot))[:3]  # of equal ones the first, on any device
        assert chosen == sorted(expected)


def test_renewed_rows_are_the_embeddings_and_moments_stay_exact():
    for queue, images, _, numbers, _ in steps(9):
        before, slots = queue.features(), images.stalest(2)
        new = torch.randn(2, D, dtype=torch.float64) * 3
        images.renew(slots, new)
        expected = before.index_copy(0, slots, new)
        torch.testing.assert_close(queue.features(), expected, rtol=1e-9, atol=1e-9)
        mean, std = queue.moments()
        torch.testing.assert_close(mean, expected.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(std, expected.std(0), rtol=1e-9, atol=1e-9)
        assert images.images.tolist() == numbers
        assert (images.recorded_at[slots] == queue.written).all()


def test_values_that_are_not_finite_renew_nothing():
    *_, (queue, images, *_) = steps(4)
    before, times, sums = queue.features(), images.recorded_at.clone(), queue.sums.clone()
    images.renew(torch.tensor([1, 4]), torch.tensor([[0.0, 1.0, torch.inf], [1.0, 1.0, 1.0]]))
    assert torch.equal(queue.features(), before)
    assert torch.equal(images.recorded_at, times)
    assert torch.equal(queue.sums, sums)


def test_residuals_are_distances_to_both_queues():
    for queue, images, plain, _, _ in steps(9, sample=M):
        filled = len(queue)
        now = F.normalize(torch.randn(M, D), dim=1)
        adapted, unadapted = images.residuals(now)
        for value, other in ((adapted, queue), (unadapted, plain)):
            rows = F.normalize(other.features().float(), dim=1)
            torch.testing.assert_close(value, (rows - now[:filled]).square().sum(1).mean())


def test_samples_are_spread_over_the_slots():
    *_, (queue, images, *_) = steps(3, sample=4)
    assert images.sample.tolist() == [0, 3, 6, 9]
    assert images.sampled().all()
    images.renew(torch.tensor([3]), torch.ones(1, D))
    rows = queue.features()[images.sample]
    assert torch.allclose(images.new[1], torch.ones(D, dtype=torch.float64))
    adapted, unadapted = images.residuals(rows)
    assert adapted < 1e-12 < unadapted


def test_state_is_restored():
    *_, (queue, images, *_) = steps(6, sample=4)
    other = RowImages(queue, 4)
    other.load_state_dict(images.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(images.buffers(), other.buffers(), strict=True))
    assert not any("rows" in name for name in images.state_dict())  # the queue is not part of it
