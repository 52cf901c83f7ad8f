"""Adapters in files: a directory of safetensors and one JSON that describes them. Nothing in it is ever executed."""
