"""Checks for regularizers."""
