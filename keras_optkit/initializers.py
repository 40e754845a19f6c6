"""Initializers (in work)."""
