"""Callbacks (in work)."""
