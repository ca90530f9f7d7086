"""Which keys give a worker more room on its device, without counting: those of the planner's advice that are not taken yet."""

from __future__ import annotations

from raydistill.config.schema import Config


def next_micro_batches(batch: int, count: int) -> int | None:
    """The next number of equal micro-batches of a batch; None: each is one sample."""
    return next((more for more in range(count + 1, batch + 1) if batch % more == 0), None)


def trainer_remedies(config: Config) -> list[str]:
    """For a worker that distils."""
    distill = config.distill
    found = [] if distill.gradient_checkpointing else ["distill.gradient_checkpointing=true"]
    if count := next_micro_batches(distill.batch_size, distill.micro_batches):
        found.insert(0, f"distill.micro_batches={count}")
    if config.fake_score.kind == "lora" and distill.mixed_precision and config.fake_score.base_dtype == "float32":
        found.append("fake_score.base_dtype=bfloat16")
    shares = distill.workers > 1 and not distill.channels_last and distill.fewest == distill.workers
    if shares and config.fake_score.kind == "lora" and not config.fake_score.shard:
        found.append("fake_score.shard=true")
    whole = config.student.kind == "full" and config.student.optimizer == "adamw" and not config.student.shard
    if shares and whole:
        found.append("student.shard=true")
    if distill.batch_size > 1:
        found.append("a smaller distill.batch_size")
    return found


def bridge_remedies(config: Config) -> list[str]:
    """For a worker that trains the Bridge."""
    bridge = config.bridge
    found = [] if bridge.gradient_checkpointing else ["bridge.gradient_checkpointing=true"]
    if count := next_micro_batches(bridge.batch_size // config.distill.fewest, bridge.micro_batches):
        found.insert(0, f"bridge.micro_batches={count}")
    return [*found, "a smaller bridge.batch_size or bridge.attention.depth_fraction"]
