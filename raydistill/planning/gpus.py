"""The table of GPUs (gpus.yaml): memory, peak arithmetic, links, prices."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from raydistill.config.keys import Count, Positive, Section
from raydistill.config.schema import Config
from raydistill.config.yaml_text import parse
from raydistill.errors import InputError
from raydistill.planning.counts import Cost

GIB = 1 << 30
GPU_TABLE = Path(__file__).with_name("gpus.yaml")


class Gpu(Section):
    """One row of gpus.yaml; the units are explained there."""

    memory_gib: Positive
    bf16_tflops: Positive
    fp32_tflops: Positive
    tf32_tflops: Positive | None = None
    link_gbytes: Positive
    per_node: Count
    price: Positive
    spot_price: Positive

    def float32(self, tf32: bool) -> float:
        """TFLOP/s at the peak of what is computed in float32."""
        return (tf32 and self.tf32_tflops) or self.fp32_tflops

    def seconds(self, work: Cost, efficiency: float, tf32: bool = False) -> float:
        """Of a piece of work, whose float32 operations run at that peak."""
        at_peak = (work.flops - work.flops_32) / self.bf16_tflops + work.flops_32 / self.float32(tf32)
        return at_peak / (1e12 * efficiency)

    def flops_per_s(self, dtype: str, efficiency: float) -> float:
        return 1e12 * efficiency * (self.fp32_tflops if dtype == "float32" else self.bf16_tflops)


def read_gpus(further: str | None = None) -> dict[str, Gpu]:
    """The table of the package, and over it that of `further`. Raises InputError naming file and kind."""
    kinds: dict[str, Gpu] = {}
    for file in (GPU_TABLE, *([Path(further).expanduser()] if further else [])):
        try:
            table = parse(file.read_text(encoding="utf-8"), f"plan.gpus: {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"plan.gpus: {file}: {error}") from None
        if not isinstance(table, dict):
            raise InputError(f"plan.gpus: {file}: must map kinds of GPU to their numbers, as {GPU_TABLE}")
        for name, row in table.items():
            try:
                kinds[str(name)] = Gpu.model_validate(row)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise InputError(f"plan.gpus: {file}: {name}: {where}: {first['msg']}") from None
    return kinds


def known_gpus(config: Config) -> dict[str, Gpu]:
    """The table, in which the configured kinds are. Raises InputError."""
    gpus = read_gpus(config.plan.gpus)
    for key in ("trainer_gpu", "teacher_gpu", "encoder_gpu"):
        kind = getattr(config.plan, key)
        if kind is not None and kind not in gpus:
            raise InputError(f"plan.{key}: {kind} is not in the table ({', '.join(gpus)})")
    return gpus
