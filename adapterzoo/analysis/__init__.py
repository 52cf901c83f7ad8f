"""Analysis: what an adapter costs and what it did. So far: parameters and bytes, counted without weights."""
