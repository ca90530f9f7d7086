"""Captions that tests of updates learn from; the last one is the empty prompt."""

CAPTIONS = [
    "a small red circle at the left on a white background",
    "a large blue square at the top on a black background",
    "a small green cross at the center on a gray background",
    "",
]
