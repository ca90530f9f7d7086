"""The embedded miniature world: real pipelines in small, so that every line of the main path is the real path."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
