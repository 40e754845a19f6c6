"""Checks for callbacks."""
