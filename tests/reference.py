"""The truth that the queue is held to: the paper's equations, literally, in float64, all M rows moved at each step."""

from __future__ import annotations

from collections import deque

import numpy as np

TINY = 1e-12


class ReferenceQueue:
    """Eqs. 6 and 18-23 of arXiv 2303.17127 on a deque of rows."""

    def __init__(self, size, adaptation="xbn", q=1.0, r=0.01, p0=1.0, gain_interval=100, literal=False):
        self.rows, self.labels = deque(maxlen=size), deque(maxlen=size)
        self.adaptation, self.q, self.r, self.p, self.gain_interval = adaptation, q, r, p0, gain_interval
        self.literal, self.u, self.k, self.step, self.gain = literal, None, None, 0, 1.0

    def target(self, batch):
        v = np.stack([batch.mean(0), batch.std(0, ddof=1)])
        return v if self.adaptation == "xbn" else self.kalman(v, len(batch))

    def kalman(self, v, batch_size):
        if self.u is None:
            self.u = v
        else:
            if self.step % self.gain_interval == 0:
                predicted = self.p + self.q  # 18
                self.gain = predicted / (predicted + self.r / batch_size)  # 19, 20
                self.p = (1 - self.gain) * (self.p if self.literal else predicted)  # 22
            self.step += 1
            self.u = self.u + self.gain * (v - self.u)  # 21
        return self.u

    def adapt(self, batch):
        batch = np.asarray(batch, dtype=np.float64)
        if len(batch) < 2 or not np.isfinite(batch).all():
            return
        mean_hat, std_hat = self.target(batch)
        if self.adaptation == "xbm" or len(self.rows) < 2:
            return
        rows = np.stack(self.rows)
        mean, std = rows.mean(0), rows.std(0, ddof=1)
        varies = (std > 1e-6 * abs(mean) + TINY) & (std_hat > 1e-6 * abs(mean_hat) + TINY)
        factor = np.where(varies, std_hat / np.where(varies, std, 1), 1)
        self.rows = deque((rows - mean) * factor + mean_hat, maxlen=self.rows.maxlen)  # 6, 23

    def enqueue(self, batch, labels=None):
        batch = np.asarray(batch, dtype=np.float64)
        if np.isfinite(batch).all():
            self.rows.extend(batch)
            self.labels.extend(range(len(batch)) if labels is None else labels)
