"""Replacements for classes of pytorch-metric-learning and lightly that use the adapted queue."""
