"""Tuning (in work)."""
