"""Checks for schedules."""
