"""Trackers: what tells other programs of a run while it goes on. Off by default."""
