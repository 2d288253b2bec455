"""Benchmarks, which print ratios that are measured side by side in one run."""
