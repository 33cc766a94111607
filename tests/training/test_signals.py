"""Signals: the first is noted, the second ends the process."""

import os
import signal
from multiprocessing import get_context

from selfsup_xbn.training.signals import stop_signals


def test_second_signal_ends_the_process_at_once():
    def signaled_twice():
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            if received != [signal.SIGTERM]:
                os._exit(1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)

    process = get_context("fork").Process(target=signaled_twice)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
