"""The keys of a configuration: type, default, meaning, range, and whether a resume may change them (`free`)."""

from __future__ import annotations

from typing import Literal

from pydantic import PrivateAttr, model_validator

from raydistill.config.keys import (
    Origin,
    Section,
    free,
)
from raydistill.config.networks import (
    BridgeConfig,
    DiscriminatorConfig,
    FakeScoreConfig,
    RewardConfig,
    StudentConfig,
    TeacherConfig,
    TeacherServiceConfig,
    VsdConfig,
)
from raydistill.config.stages import (
    DistillConfig,
    EvaluationConfig,
    PlanConfig,
    PromptsConfig,
    RunConfig,
    SynthesisConfig,
    TrackingConfig,
)


class Config(Section):
    """Root of the tree."""

    storage: str = free(
        "outputs",
        min_length=1,
        description="folder that roots everything a run writes, or s3://bucket/prefix, gs://bucket/prefix",
    )
    run: RunConfig = RunConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    teachers: TeacherServiceConfig = TeacherServiceConfig()
    bridge: BridgeConfig = BridgeConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    fake_score: FakeScoreConfig = FakeScoreConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    vsd: VsdConfig = VsdConfig()
    reward: RewardConfig = RewardConfig()
    distill: DistillConfig = DistillConfig()
    controls: list[Literal["no_vsd", "shared_space"]] = free(
        [], description="extra runs for comparison: VSD off; the student's own weak model as teacher (identity Bridge)"
    )
    prompts: PromptsConfig = PromptsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = free(TrackingConfig())
    plan: PlanConfig = free(PlanConfig())

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def fake_micro_batches(self) -> int:
        """Micro-batches of a worker in an update of the fake score."""
        distill, fake = self.distill, self.fake_score.batch_size
        return distill.micro_batches if fake is None else fake * distill.micro_batches // distill.batch_size

    @property
    def origin(self) -> Origin:
        return self._origin

    def of(self, origin: Origin) -> Config:
        """Itself, with the origin from now on."""
        self._origin = origin
        return self

    @model_validator(mode="after")
    def _names(self) -> Config:
        if self.vsd.weight == 0 and self.discriminator.weight == 0:
            raise ValueError("vsd.weight and discriminator.weight are both 0: nothing would teach the student")
        if self.fake_score.shard and self.fake_score.kind != "lora":
            raise ValueError(f"fake_score.shard: nothing of kind={self.fake_score.kind} is frozen; use kind=lora")
        narrow = self.fake_score.kind == "lora" and self.fake_score.base_dtype != "float32"
        if narrow and not self.distill.mixed_precision:
            raise ValueError(
                f"fake_score.base_dtype={self.fake_score.base_dtype} gives the same numbers under autocast alone: set "
                "distill.mixed_precision=true, or use float32"
            )
        if self.student.autocast != "auto" and not self.distill.mixed_precision:
            raise ValueError(
                f"student.autocast={self.student.autocast} is a part of mixed precision: set distill.mixed_precision=true, or "
                "use auto"
            )
        size, fake = self.distill.batch_size // self.distill.micro_batches, self.fake_score.batch_size
        if fake is not None and (fake > self.distill.batch_size or fake % max(1, size)):
            raise ValueError(
                f"fake_score.batch_size={fake}: it must be a multiple of a micro-batch of {size} samples, and at most "
                f"distill.batch_size={self.distill.batch_size}"
            )
        if self.fake_score.shard and self.distill.fewest < self.distill.workers:
            raise ValueError("distill.min_workers: with fake_score.shard the number of workers is fixed")
        if self.bridge.trainable and self.distill.fewest < self.distill.workers:
            raise ValueError("distill.min_workers: with bridge.trainable the number of workers is fixed")
        return self
