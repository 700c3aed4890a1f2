"""Benchmarks of hf_admm beside its peers: `make bench`, or one of them, as `python -m benchmarks.projection`."""
