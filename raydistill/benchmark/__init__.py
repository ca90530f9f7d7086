"""Sections of `jobs/benchmark.py`: ratios measured in one run on one machine, medians over repeats.

A section is a module of this package with three functions; the job imports it when it is named:

    add_arguments(parser)     its options
    run(arguments) -> dict    what it measured, ready for JSON
    table(result) -> str      the same as a markdown table, with what must be known to read it
"""

from __future__ import annotations

SECTIONS = {
    "schedule": "an update against its critical path; sequential and in one process against overlapped",
    "service": "latency and copies of a score request against a bare actor call, 0.1 to 256 MB",
    "scale": "throughput of 1 to 32 simulated replicas and of 1 to 8 simulated trainers",
    "data": "prompts per second through reading and encoding, memory of a million prompts, trainers' wait for data",
    "memory": "peak memory of every role against the plan; loading in ZeRO-3 shards",
    "startup": "seconds from the command to the first update, by phase",
    "latency": "one picture: the student alone, and with the Bridge and each teacher's decoder",
    "realsize": "one update of SD 1.5 with its Bridge at real size on the CPU",
    "gpu": "real sizes on a GPU: score forwards, a student step and its memory, what the Bridge adds to a picture",
    "quality": "what quality costs: teacher forwards until the student is nearly as good, by fake score, k and GAN",
    "pairs": "how many pairs a Bridge needs, and of what: its fidelity, and its student's accuracy",
    "chaos": "a run that goes on while its processes are killed, against the same run left alone",
}
