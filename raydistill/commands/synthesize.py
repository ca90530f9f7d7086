"""Make a set of latent pairs: the teacher draws the prompts (or synthesis.images names real images), and the VAEs of
teacher and student encode each picture. The result is <storage>/<run.name>/pairs, to be named in bridge.pairs or
discriminator.real_data. A run is resumed by starting it again with the same run.name."""

from __future__ import annotations

from raydistill.driver.job import Job, run_job

STAGES = "raydistill.driver.single_stages"
UNUSED = {  # of other stages: what they name need not fit this teacher
    "bridge": {"checkpoint": None, "pairs": None, "source": "stored"},
    "discriminator": {"real_data": None, "real_source": "pairs"},
    "student": {"unet": None},
    "evaluation": {"judge": None},
}


JOB = Job(
    run=f"{STAGES}:pairs_only",
    result="pairs/summary.json",
    changes=UNUSED,
    check=f"{STAGES}:check_pairs_folder",
    roles=["teacher rank", "drawer rank", "synthesis, prompts", "synthesis, pictures"],
    stages=("synthesis",),
)


def main() -> int:
    return run_job(__doc__, JOB)
