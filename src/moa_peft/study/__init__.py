"""Comparison studies: methods x seeds x data on one budget, with their tables, statistics and pictures."""
