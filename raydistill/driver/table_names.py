"""Names of the paper's tables in miniature; light, so that the command line needs nothing else."""

from __future__ import annotations

TABLES = ("table1", "table3")


def result_name(table: str, seeds: int) -> str:
    """File of a run's folder; a table of more seeds is another one."""
    return f"{table}-{seeds}-seeds.json"
