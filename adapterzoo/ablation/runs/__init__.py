"""Runs: their content, their directories, and the process that does one."""
