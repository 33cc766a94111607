"""Utilities without dependencies on other subpackages."""
