"""Grids: what is compared, read, checked and spread out into cells."""
