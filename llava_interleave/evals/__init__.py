"""Benchmarks: tasks, scores and statistics over any function that answers. Knows no models."""
