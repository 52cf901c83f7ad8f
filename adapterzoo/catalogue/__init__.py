"""The catalogue: which pieces there are, and what each is, holds and costs on a layer of some shape."""
