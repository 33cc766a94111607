"""The data sets, one module each, with a function ``load`` that returns an ``ImageData``."""
