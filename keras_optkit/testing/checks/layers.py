"""Checks for layers."""
