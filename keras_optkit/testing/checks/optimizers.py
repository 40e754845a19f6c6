"""Checks for optimizers."""
