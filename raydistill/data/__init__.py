"""Prompts, their conditioning, and data sets of teacher samples."""
