"""Studies: questions put to the library on a real task, answered by `python -m studies <study>`."""
