"""Loads the settings of all tests where tests are run: the process that only distributes them needs no torch."""


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.getoption("tx", None):
        config.pluginmanager.import_plugin("tests.fixtures")
