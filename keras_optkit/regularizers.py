"""Regularizers (in work)."""
