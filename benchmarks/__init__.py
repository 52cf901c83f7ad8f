"""Benchmarks of adapterzoo, one script for each claim: `python -m benchmarks`, or `make bench`."""
