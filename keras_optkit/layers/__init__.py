"""Layers (in work)."""
