"""The best student of a stage: kept while it learns, loaded and exported at the end."""

from __future__ import annotations

from raydistill.config.reading import config_hash, draws, other_drawer
from raydistill.config.schema import Config
from raydistill.distillation.networks import Networks
from raydistill.export.licences import picture_sets
from raydistill.export.pipeline import ModelCard, export_student
from raydistill.storage.atomic import writing
from raydistill.storage.place import Place
from raydistill.workers.adoption import load, mark
from raydistill.workers.checkpoint import CheckpointError, save_state
from raydistill.workers.stage import Stage

BEST = "best"  # folder of a stage


class BestStudent:
    """`best/` of a stage's folder: the evaluated student, and a Bridge that is trained along."""

    def __init__(self, stage: Stage, config: Config, networks: Networks) -> None:
        self.stage, self.config, self.networks = stage, config, networks

    def keep(self, step: int, value: float) -> None:
        with writing(self.stage.path(BEST)) as folder:
            folder.mkdir(exist_ok=True)
            save_state(folder, self.networks.best_state(), {"step": step, "score": value} | mark(self.stage.runs))

    def restore(self, step: int) -> int:
        """Load it; returns the step that it is of. Where it is damaged, the student of `step` stays, and that is said."""
        try:
            best = load(self.stage.path(BEST), self.stage.runs)
        except CheckpointError as error:
            print(f"{self.stage.name}: {error}; the student of update {step} is exported instead", flush=True)
            return step
        self.networks.load_best_state(best.state)
        return best.about["step"]

    def card(self, step: int, table: dict[str, float]) -> ModelCard:
        """The model card of the student of update `step`, with this table of metrics."""
        config = self.config
        return ModelCard(
            teacher=config.teacher.model,
            teacher_class=self.networks.teacher_space.pipeline_class,
            student=config.student.model,
            student_class=self.networks.student_space.pipeline_class,
            steps=step,
            run_id=self.stage.mlflow_run,
            config_hash=config_hash(config),
            metrics=table,
            start=config.student.unet,
            lora_start=config.student.lora_start,
            drawer=config.synthesis.teacher if draws(config) and other_drawer(config) else None,
            pictures=picture_sets(config),
        )

    def export(self, step: int, table: dict[str, float]) -> list[Place]:
        """Write what is loaded, of update `step`, as `export/`, and the Bridge as `bridge/`; returns the folders."""
        networks, config, folders = self.networks, self.config, [self.stage.path("export")]
        card, steps = self.card(step, table), {"steps": config.student.steps}
        start = config.student.start_timestep
        with writing(folders[0]) as folder:
            export_student(networks.student_space, networks.evaluated, start, folder, card, **steps)
        if config.bridge.trainable:
            folders.append(self.stage.path("bridge"))
            with writing(folders[1]) as folder:
                networks.bridge.save(folder, {"step": step}, pictures=picture_sets(config))
        return folders
