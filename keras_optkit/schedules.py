"""Schedules (in work)."""
