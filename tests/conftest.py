"""Loads the settings of all tests where tests are run: the process that only distributes them needs no torch."""

import gc


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.getoption("tx", None):
        gc.disable()  # until all tests are collected
        config.pluginmanager.import_plugin("tests.fixtures")
