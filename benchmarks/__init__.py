"""Speed of normkit beside its peers, in one process and one run: ``python -m benchmarks``."""
