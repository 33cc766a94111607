"""Measurements on a CUDA device."""
