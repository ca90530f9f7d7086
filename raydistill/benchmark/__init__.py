"""What `python jobs/benchmark.py SECTION` measures, one module a section: `add_arguments`, `run` and `table`."""
