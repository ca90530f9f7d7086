"""The table of GPUs (gpus.yaml): memory, peak arithmetic and the share of it that is reached, links, prices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from raydistill.config.keys import Count, Fraction, Positive, Section
from raydistill.config.schema import Config
from raydistill.config.yaml_text import dump, parse
from raydistill.errors import InputError
from raydistill.planning.counts import Cost
from raydistill.storage.atomic import replace_text
from raydistill.storage.staging import cache_folder

Row = TypeVar("Row", bound=Section)

GIB = 1 << 30
GPU_TABLE = Path(__file__).with_name("gpus.yaml")
MEASURED = "speeds.yaml"  # beside the counts: what `jobs/benchmark.py gpu` has measured on this machine
USUAL_SHARE = 0.4  # of the peak, where nothing is known


class Speed(Section):
    """The share of the peak arithmetic that a role's networks reach on a kind of GPU, and where the number comes from."""

    share: Annotated[Fraction, Field(gt=0)]
    source: Literal["published", "measured", "assumed", "plan.efficiency"]


class Speeds(Section):
    """By role; None: not known."""

    teacher: Speed | None = None
    teacher_compiled: Speed | None = None
    trainer: Speed | None = None
    trainer_compiled: Speed | None = None
    text: Speed | None = None
    vae: Speed | None = None


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
    device: str | None = None
    speed: Speeds = Speeds()

    def of(self, role: str, config: Config) -> Speed:
        """What a role reaches: the configured share, else the table's, as the role's networks run."""
        if config.plan.efficiency is not None:
            return Speed(share=config.plan.efficiency, source="plan.efficiency")
        eager = self._known(role, "")
        compiled = self._known(role, "_compiled") if is_compiled(role, config) else None
        return compiled if compiled is not None and compiled.share > eager.share else eager

    def _known(self, role: str, how: str) -> Speed | None:
        """The table's share; a trainer runs the teacher's kinds of networks. None: not known of compiled ones."""
        if (known := getattr(self.speed, role + how, None)) is not None:
            return known
        alike = getattr(self.speed, f"teacher{how}") if role == "trainer" else None
        if alike is None and how:
            return None
        return Speed(share=alike.share if alike else USUAL_SHARE, source="assumed")

    def share(self, role: str, config: Config) -> float:
        return self.of(role, config).share

    def float32(self, tf32: bool) -> float:
        """TFLOP/s at the peak of what is computed in float32."""
        return (tf32 and self.tf32_tflops) or self.fp32_tflops

    def seconds(self, work: Cost, efficiency: float, tf32: bool = False) -> float:
        """Of a piece of work, whose float32 operations run at that peak."""
        at_peak = (work.flops - work.flops_32) / self.bf16_tflops + work.flops_32 / self.float32(tf32)
        return at_peak / (1e12 * efficiency)

    def flops_per_s(self, dtype: str, efficiency: float) -> float:
        return 1e12 * efficiency * (self.fp32_tflops if dtype == "float32" else self.bf16_tflops)


def is_compiled(role: str, config: Config) -> bool:
    """Whether the role's networks run compiled."""
    return {"teacher": config.teachers.compile, "trainer": config.distill.compile}.get(role, False)


def read_gpus(further: str | None = None) -> dict[str, Gpu]:
    """The table of the package, and over it that of `further`. Raises InputError naming file and kind."""
    kinds: dict[str, Gpu] = {}
    for file in (GPU_TABLE, *([Path(further).expanduser()] if further else [])):
        for name, row in _table("plan.gpus", file, f"kinds of GPU to their numbers, as {GPU_TABLE}").items():
            kinds[name] = _valid(Gpu, row, f"plan.gpus: {file}: {name}")
    return kinds


def _table(key: str, file: Path, what: str) -> dict[str, Any]:
    """A YAML file that maps kinds of GPU. Raises InputError naming key and file."""
    try:
        table = parse(file.read_text(encoding="utf-8"), f"{key}: {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {file}: {error}") from None
    if not isinstance(table, dict):
        raise InputError(f"{key}: {file}: must map {what}")
    return {str(name): row for name, row in table.items()}


def _valid(kind: type[Row], row: Any, where: str) -> Row:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def measured_file(config: Config) -> Path:
    """Where measured speeds are kept: what the configuration names, else in the cache."""
    named = config.plan.measured
    return Path(named).expanduser() if named else cache_folder() / MEASURED


def _with_measured(gpus: dict[str, Gpu], config: Config) -> dict[str, Gpu]:
    """The table with what was measured over what it says. Kinds that it does not have are left out."""
    file = measured_file(config)
    if config.plan.measured is None and not file.is_file():
        return gpus
    result = dict(gpus)
    for name, row in _table("plan.measured", file, "kinds of GPU to roles and their shares").items():
        speeds = _valid(Speeds, row, f"plan.measured: {file}: {name}")
        if name in result:
            known = result[name].speed.model_copy(update={role: one for role, one in speeds if one is not None})
            result[name] = result[name].model_copy(update={"speed": known})
    return result


def keep_measured(file: Path, kind: str, shares: Mapping[str, float]) -> None:
    """Add what was measured on a kind of GPU to a file; other kinds and roles in it stay. Raises InputError, OSError."""
    table = _table("plan.measured", file, "kinds of GPU") if file.is_file() else {}
    roles = {role: {"share": round(share, 4), "source": "measured"} for role, share in shares.items()}
    _valid(Speeds, row := {**table.get(kind, {}), **roles}, f"plan.measured: {file}: {kind}")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, dump(table | {kind: row}))


def kind_of(device: str, gpus: Mapping[str, Gpu]) -> str | None:
    """The kind of GPU that the driver calls so; None: the table has none such."""
    return next((name for name, gpu in gpus.items() if gpu.device is not None and gpu.device in device), None)


def known_gpus(config: Config) -> dict[str, Gpu]:
    """The table, in which the configured kinds are, with what was measured. Raises InputError."""
    gpus = _with_measured(read_gpus(config.plan.gpus), config)
    for key in ("trainer_gpu", "teacher_gpu", "encoder_gpu"):
        kind = getattr(config.plan, key)
        if kind is not None and kind not in gpus:
            raise InputError(f"plan.{key}: {kind} is not in the table ({', '.join(gpus)})")
    return gpus
