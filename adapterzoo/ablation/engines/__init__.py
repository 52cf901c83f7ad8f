"""Engines: where runs happen."""
