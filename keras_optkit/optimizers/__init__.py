"""Optimizers (in work)."""
