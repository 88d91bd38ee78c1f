"""The five papers' own experiments, ours beside the published figures: ``python -m benchmarks.papers --paper NAME``."""
