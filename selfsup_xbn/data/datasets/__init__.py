"""Data/Datasets."""
