"""Ablations: comparisons of compositions. They need the extra: `pip install "adapterzoo[ablation]"`.

`python -m adapterzoo.ablation.demo` runs a small real one.
"""
