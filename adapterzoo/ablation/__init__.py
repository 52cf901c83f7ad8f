"""Ablations: comparisons of compositions. `python -m adapterzoo.ablation.demo` runs a small real one."""
