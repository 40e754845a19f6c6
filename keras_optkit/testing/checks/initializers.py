"""Checks for initializers."""
