"""What every Ray Train worker runs, in processes of torch's own: stopped by a collapse, resumed, broken by a value.

Ray Train's part is played by `Train`, which keeps the last two checkpoints in folders; prompts are encoded in the process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
from ray.exceptions import RayActorError
from safetensors.torch import load_file

from raydistill.background import in_background
from raydistill.config.reading import load, validate
from raydistill.data.prompts import held_out_prompts
from raydistill.data.stream import slot_positions
from raydistill.distillation.gradients import OTHERS
from raydistill.errors import NonFiniteError, RunLost
from raydistill.evaluation.evaluator import FixedPrompts, StudentEvaluator
from raydistill.export.source import Export, open_student_export
from raydistill.pictures.files import load_pictures
from raydistill.shapes import WEIGHTS
from raydistill.spaces.published_students import load_student
from raydistill.storage.lease import LEASE_FILE, Lease, holding
from raydistill.storage.resolve import resolve
from raydistill.teachers.request import TeacherStartError
from raydistill.workers import adoption, assembly, distill, ray_train
from raydistill.workers.checkpoint import CheckpointError, load_state
from raydistill.workers.distill import launch
from raydistill.workers.stage import Stage

SMALL = (
    "vsd.weight=0", "distill.steps=4", "distill.batch_size=4", "distill.micro_batches=2", "fake_score.updates=1",
    "discriminator.real_count=16", "evaluation.count=4", "evaluation.periodic_count=4", "evaluation.grid=4",
    "distill.evaluate_every=1", "distill.checkpoint_every=4",
)  # fmt: skip


class Train:
    """`ray.train` as a worker sees it."""

    def __init__(self, folder, rank, world):
        self.folder = Path(folder)
        self.context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world)
        self.Checkpoint = Checkpoint
        (self.folder / "checkpoints").mkdir(exist_ok=True)

    def get_context(self):
        return self.context

    def get_checkpoint(self):
        found = kept(self.folder)
        return Checkpoint(str(found[-1])) if found else None

    def get_all_reported_checkpoints(self):
        return [SimpleNamespace(checkpoint=Checkpoint(str(path))) for path in kept(self.folder)]

    def report(self, metrics, checkpoint=None):
        if checkpoint is not None:
            found = kept(self.folder)
            number = int(found[-1].name.removeprefix("checkpoint_")) + 1 if found else 0
            shutil.copytree(checkpoint.path, self.folder / "checkpoints" / f"checkpoint_{number:03}")
            for old in found[:-1]:
                shutil.rmtree(old)


@dataclass(frozen=True)
class Checkpoint:
    path: str

    @classmethod
    def from_directory(cls, folder):
        return cls(str(folder))

    def as_directory(self):
        return contextlib.nullcontext(self.path)


def kept(folder):
    """Checkpoints of a stage, the oldest first."""
    return sorted(Path(folder, "checkpoints").glob("checkpoint_*"))


def damage(folder):
    """Flip one bit in the middle of a state: among the weights."""
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def batches(config, worker, first, reals=None):
    """As `assembly.batches_after`, of eight captions, which are encoded at once: the rest runs beside what loads networks."""
    from raydistill.data.encode import TextEncoder
    from raydistill.spaces import load_space

    captions = (WEIGHTS / "prompts.txt").read_text().splitlines()[:8]
    models = {"student": config.student.model, "teacher": config.teacher.model}
    tables = {
        role: TextEncoder(load_space(resolve(model))).encode(captions) for role, model in models.items()
    }  # fmt: skip

    def columns(ids):
        rows = [i % 8 for i in ids]
        return {
            f"{role}.{name}": value[rows].numpy() for role, table in tables.items() for name, value in table.items()
        }

    def read():
        own, size = assembly.own_slot_rows(config, worker), config.distill.workers * config.distill.batch_size
        for slot in itertools.count(first * (1 + config.fake_score.updates)):
            ids = slot_positions(slot, own, size)
            yield {"sample_id": ids} | columns(ids)
            if reals is not None and (fake := reals.order.slot(slot)) is not None:
                positions = slot_positions(fake, own, size)
                samples = reals.order.rows(positions)
                yield {"sample_id": positions, "prompt_id": samples} | columns(samples)

    return read()


def work(rank, settings, world, port):
    """The body of one worker."""
    torch.set_num_threads(1)
    distill.ray = ray_train.ray = adoption.ray = SimpleNamespace(train=Train(settings["folder"], rank, world))
    distill.batches_after = batches
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    distill.distil(Stage(**settings))


@pytest.fixture(scope="module", name="store")
def fixture_store(tmp_path_factory):
    """(uri, storage) of an MLflow store; making one takes seconds."""
    storage = tmp_path_factory.mktemp("store")
    return f"sqlite:///{storage}/mlflow.db", storage


@pytest.fixture(name="stage")
def fixture_stage(store, tmp_path):
    def make(*overrides):
        from raydistill.tracking.store import open_run

        uri, storage = store
        config = load(overrides=[*SMALL, *overrides])
        run = open_run(uri, "tests", "distill", storage=storage, params={}, tags={})
        bridge, real = str(WEIGHTS / "bridge" / "sd15-flux"), str(WEIGHTS / "samples" / "flux")
        return asdict(
            Stage(
                name="distill",
                config=config.model_dump(),
                folder=str(tmp_path),
                bridge=bridge,
                real=real,
                mlflow_uri=uri,
                mlflow_run=run,
            )
        )

    return make


def start(settings, world=1):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (settings, world, port), nprocs=world)


@pytest.fixture(name="work_here")
def fixture_work_here(monkeypatch):
    """`work` of one worker in this process."""
    monkeypatch.setattr(distill, "ray", distill.ray)
    monkeypatch.setattr(ray_train, "ray", ray_train.ray)
    monkeypatch.setattr(adoption, "ray", adoption.ray)
    monkeypatch.setattr(distill, "batches_after", batches)
    return lambda settings: work(0, settings, 1, None)


def tracked(settings):
    return mlflow.MlflowClient(settings["mlflow_uri"]).get_run(settings["mlflow_run"]).data


def result(settings):
    return json.loads(Path(settings["folder"], "result.json").read_text())


@pytest.mark.full
def test_two_workers_stop_together_at_a_collapse_and_export_the_best(stage, tmp_path):
    settings = stage("distill.stop_on_collapse=true", "distill.drift_limit=0.02", "distill.workers=2")
    start(settings, world=2)
    told, data = result(settings), tracked(settings)
    assert told["stopped"].startswith(f"step {told['steps']}: the latents' drift from the teacher's samples is ")
    assert 1 <= told["steps"] < 4
    assert told["best_step"] <= told["steps"]
    assert data.tags["collapse_alarm"] == told["stopped"]
    assert data.metrics["guard/latent_drift_average"] > 0.02
    assert load_state(kept(tmp_path)[-1])[1]["step"] == told["steps"]  # although none was due
    assert (tmp_path / "export" / "model_index.json").is_file()
    # killed before its result was there: the next attempt trains no further, and says the same
    Path(settings["folder"], "result.json").unlink()
    start(settings, world=2)
    assert result(settings) == told


@pytest.mark.full
def test_an_alarm_alone_stops_nothing_and_a_stopped_run_can_be_told_to_go_on(stage):
    settings = stage("distill.stop_on_collapse=true", "distill.drift_limit=1e-6")
    start(settings)
    assert result(settings)["steps"] == 1
    tree = validate(settings["config"]).model_dump()
    tree["distill"]["stop_on_collapse"] = False
    start(settings | {"config": tree})
    told = result(settings)
    assert (told["steps"], told["stopped"]) == (4, None)
    assert tracked(settings).tags["collapse_alarm"].startswith("step ")


@pytest.mark.full
def test_a_student_of_four_steps_is_exported_as_it_was_evaluated(stage, work_here, tmp_path):
    """A LoRA: what it draws at the end is what its export draws."""
    work_here(stage("student.steps=4", "student.kind=lora", "student.lr=1e-3", "distill.steps=2"))
    space, start_timestep, steps = open_student_export(Export(tmp_path / "export", "export"))
    assert (start_timestep, steps) == (999, 4)
    assert (tmp_path / "export" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    config = load(overrides=[*SMALL])
    fixed = FixedPrompts(held_out_prompts(config), config.evaluation.count, config.evaluation.seed)
    evaluator = StudentEvaluator(space, fixed, config.evaluation, "cpu")
    network, pictures = load_student(space, tmp_path / "export"), load_pictures(tmp_path / "after.safetensors")
    assert (evaluator.draw(network, 999, 4) - pictures).abs().mean() < 0.02, "up to float16"
    assert (evaluator.draw(network, 999) - pictures).abs().mean() > 0.05


@pytest.mark.full
def test_a_value_that_is_not_finite_is_tagged_and_counted(stage, work_here, tmp_path):
    settings = stage("student.lr=1e30")
    with pytest.raises(NonFiniteError) as caught:
        work_here(settings)
    data = tracked(settings)
    assert data.tags["non_finite"].startswith("step ")
    assert data.tags["non_finite"].endswith(f", worker 0: {caught.value}")
    assert data.metrics["guard/non_finite"] == caught.value.count >= 1
    assert not (tmp_path / "result.json").exists()


@pytest.mark.full
def test_samples_that_are_left_out_are_named_in_the_run_which_goes_on(stage, work_here, monkeypatch, capsys):
    """With every switch of the discriminator and of the rates on, as the checkpoint keeps them; one update is a resume's."""
    switches = (
        "discriminator.standardize=true", "discriminator.depths=[0.3,0.9]", "discriminator.r1_weight=1",
        "discriminator.step_together=true", "distill.schedule=cosine", "student.ema=power",
    )  # fmt: skip
    settings = stage("distill.steps=2", "distill.checkpoint_every=1", "distill.non_finite_share=0.25", *switches)

    def spoilt(config, worker, first, reals=None):
        for batch in plain(config, worker, first, reals):
            if 5 in (ids := list(batch["sample_id"])) and "prompt_id" not in batch:  # of the first update's fake score
                batch["student.prompt_embeds"] = batch["student.prompt_embeds"].copy()
                batch["student.prompt_embeds"][ids.index(5)] = float("nan")
            yield batch

    plain = batches
    monkeypatch.setitem(globals(), "batches", spoilt)
    with monkeypatch.context() as cut:
        cut.setattr(distill.DistillationRun, "agree", lambda run, step: True)  # as if it was told to leave
        cut.setattr(distill.DistillationRun, "leave", lambda run: None)
        work_here(settings)
    state = load_state(kept(settings["folder"])[-1])[0]
    assert state["updates"] == 1
    assert state["discriminator"]["heads.1.spread"].min() > 0
    work_here(settings)
    assert result(settings)["steps"] == 2
    data = tracked(settings)
    words = "step 1, worker 0: left out: the student's x0: not finite in samples [1] of 2 (sample ids [5])"
    assert data.tags["left_out"] == words
    assert words in capsys.readouterr().out
    assert "non_finite" not in data.tags
    history = mlflow.MlflowClient(settings["mlflow_uri"]).get_metric_history(settings["mlflow_run"], "guard/left_out")
    assert [(one.step, one.value) for one in history] == [(1, 1.0)]


def test_a_worker_whose_own_part_was_finite_leaves_the_naming_to_the_one_whose_was_not():
    run = object.__new__(distill.DistillationRun)  # without a stage, to whose run it could write
    run.note_non_finite(NonFiniteError(f"{OTHERS} fake gradient: not finite in samples [0] of 1", elsewhere=True))
    with pytest.raises(AttributeError):
        run.note_non_finite(NonFiniteError("the fake gradient: not finite in samples [0] of 1"))


@pytest.mark.full
def test_numbers_of_a_lost_run_do_not_reach_the_others_mlflow_run(stage, work_here, tmp_path, monkeypatch):
    """Another job takes it over in the second update: its metrics, pictures and lines are nobody's."""
    settings, update, done = stage(), distill.distillation_step, []
    me = {"host": "h", "pid": 1, "started": "now", "token": "mine"}
    (tmp_path / LEASE_FILE).write_text(json.dumps(me))

    def lost_in_the_second(*arguments):
        update(*arguments)
        done.append(1)
        if len(done) == 2:
            (tmp_path / LEASE_FILE).write_text(json.dumps(me | {"token": "another"}))

    monkeypatch.setattr(distill, "distillation_step", lost_in_the_second)
    with holding(Lease(tmp_path, "mine")), pytest.raises(RunLost):
        work_here(settings)
    client = mlflow.MlflowClient(settings["mlflow_uri"])
    assert [metric.step for metric in client.get_metric_history(settings["mlflow_run"], "loss/gan")] == [1]
    pictures = [file.path.split("+") for file in client.list_artifacts(settings["mlflow_run"], "images")]
    assert {parts[2] for parts in pictures if parts[0] == "images/periodic"} == {"0", "1"}
    assert len((tmp_path / "steps-0.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "error", [TeacherStartError("cannot be placed"), RayActorError()], ids=lambda e: type(e).__name__
)
@pytest.mark.full
def test_a_failure_beside_a_stage_ends_it_while_its_workers_wait(stage, monkeypatch, error):
    """As of teachers that cannot be placed: the trainers wait for them, or for a place of their own, and say nothing."""
    never = threading.Event()
    starts = []

    def waiting(run_config):
        return SimpleNamespace(fit=never.wait, run_config=run_config)

    monkeypatch.setattr(ray_train, "wait_for_room", lambda *_: None)  # without a cluster there is none
    monkeypatch.setattr(ray_train, "TorchTrainer", lambda *_, run_config, **__: starts.append(1) or waiting(run_config))

    def fail():
        never.wait(0.5)
        raise error

    try:
        with pytest.raises(type(error)) as raised:
            launch(Stage(**stage()), [in_background(fail)])
    finally:
        never.set()
    assert raised.value is error
    assert len(starts) == 1, "it is not taken for the loss of Ray Train's controller"


def test_a_damaged_checkpoint_costs_the_updates_since_the_one_before_it(stage, work_here, tmp_path, capfd):
    settings = stage("distill.checkpoint_every=1", "distill.steps=3")
    work_here(settings)
    before, newest = kept(tmp_path)
    wanted, told = load_state(newest), result(settings)
    damage(newest)
    (tmp_path / "result.json").unlink()
    capfd.readouterr()
    work_here(settings)
    said = capfd.readouterr().out
    assert f"{newest}: damaged or incomplete checkpoint" in said
    assert f"going on from {before}, step 2" in said
    found = load_state(kept(tmp_path)[-1])
    assert found[1] == wanted[1]
    assert found[0]["student"].keys() == wanted[0]["student"].keys()
    assert all(torch.equal(value, wanted[0]["student"][name]) for name, value in found[0]["student"].items())
    assert result(settings) == told

    damage(tmp_path / "best")  # found out at the end, and no reason to lose the run
    (tmp_path / "result.json").unlink()
    work_here(settings)
    assert f"{tmp_path / 'best'}: damaged" in (said := capfd.readouterr().out)
    assert "the student of update 3 is exported instead" in said
    assert result(settings)["best_step"] == 3

    damage(kept(tmp_path)[-1])  # the other one is damaged still
    with pytest.raises(CheckpointError, match=f"none is left. Remove {tmp_path / 'checkpoints'} to begin again"):
        work_here(settings)


@pytest.mark.full
def test_a_student_that_is_a_lora_lives_resumes_with_the_same_bits_and_ships_both_forms(stage, work_here, tmp_path):
    lora = ("student.kind=lora", "student.rank=4", "student.lr=1e-3", "student.ema_decay=0.9")
    settings = stage(*lora, "distill.checkpoint_every=1", "distill.steps=3")
    work_here(settings)
    wanted, told = load_state(kept(tmp_path)[-1]), result(settings)
    shutil.rmtree(kept(tmp_path)[-1])
    (tmp_path / "result.json").unlink()
    work_here(settings)  # goes on from update 2
    found = load_state(kept(tmp_path)[-1])
    assert found[1] == wanted[1]
    assert result(settings) == told
    leaves = [torch.utils._pytree.tree_flatten(state) for state, _ in (wanted, found)]
    assert leaves[0][1] == leaves[1][1]
    for one, other in zip(leaves[0][0], leaves[1][0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert all(".lora_" in name for part in ("student", "ema") for name in wanted[0][part])
    best = load_state(tmp_path / "best")[0]["student"]
    shipped = load_file(tmp_path / "export" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(best) == len(shipped)
    assert all(torch.equal(v, shipped[f"unet.{name.replace('.default', '')}"]) for name, v in best.items())
    assert (tmp_path / "export" / "unet" / "config.json").is_file()


@pytest.fixture
def torchs_own_precision():
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def test_each_worker_computes_as_configured_and_asks_a_replica_of_its_own_first(torchs_own_precision):
    """Workers ask at the same moment, and replicas are equally busy then."""
    settings = ["vsd.weight=1", "discriminator.weight=0", "distill.workers=2", "distill.tf32=true"]
    config = load(overrides=[*SMALL, *settings])
    bridge = str(WEIGHTS / "bridge" / "sd15-flux")
    stage = Stage(
        name="distill",
        config=config.model_dump(),
        folder="",
        bridge=bridge,
        service="teacher-of-another",
        mlflow_uri="",
        mlflow_run="",
    )
    workers = [ray_train.Worker(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    clients = [assembly.load_distiller(stage, config, worker, iter(()))[1].client for worker in workers]
    assert torch.get_float32_matmul_precision() == "high", "distill.tf32"
    assert [(client.name, client.position) for client in clients] == [
        ("teacher-of-another", 0.0),
        ("teacher-of-another", 0.5),
    ]


def test_text_encoders_are_asked_for_as_the_configuration_says(monkeypatch):
    monkeypatch.setattr(assembly, "conditioned_batches", lambda *args, **settings: settings)
    prompts = ["prompts.node_labels={role: teacher}", "prompts.encoders=3", "prompts.gpus_per_encoder=0.25"]
    prompts += ["prompts.encoder_dtype=bfloat16"]
    asked = assembly.batches_after(load(overrides=prompts), ray_train.Worker(0, 1, torch.device("cpu")), 0)
    assert asked["dtype"] == {"student": "float32", "teacher": "bfloat16"}
    assert (asked["node_labels"], asked["encoders"], asked["gpus_per_encoder"]) == ({"role": "teacher"}, 3, 0.25)
