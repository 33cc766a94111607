"""Experiments: one module for each table or figure. Results are JSON files in ``results/``."""
