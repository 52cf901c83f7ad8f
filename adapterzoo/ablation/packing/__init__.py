"""Packing: several runs on one frozen base, trained side by side in one process."""
