"""Driving: from a grid to its runs, done and kept."""
