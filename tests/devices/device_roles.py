"""The roles of a run on pretended tensors: `ROLES[name](bench, mode)` does what a process of that role does, once."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from device_bench import CAPTIONS, IN_PARTS, Bench
from pretended_tensors import CUDA, Notes, PretendedTensors
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import build_objective
from raydistill.bridge.trainer import BridgeTrainer
from raydistill.config.networks import TeacherServiceConfig
from raydistill.data.encode import PromptEncoder, PromptTable
from raydistill.data.synthesis import encode_rows
from raydistill.data.vae import PairEncoder
from raydistill.distillation import fake_score, sharding
from raydistill.distillation.batches import Made
from raydistill.distillation.reward import load_reward
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import Distiller
from raydistill.evaluation.evaluator import StudentEvaluator
from raydistill.shapes import WEIGHTS
from raydistill.shapes.judge import attributes_of
from raydistill.teachers.request import GenerateRequest, Memory, ScoreRequest
from raydistill.teachers.shard import TeacherRank

Role = Callable[[Bench, PretendedTensors], None]
UNETS = ("sdxl", "kolors")  # which cannot be truncated


def answered(made: Made) -> Any:
    """A score request whose answer is there."""
    scores = made.x_t * 0.5
    return type("Scores", (), {"result": lambda _: scores, "ready": lambda _: True})()


# -- the device itself --------------------------------------------------------------------------------------------


def _refused(compute: Callable[[], Any]) -> bool:
    try:
        compute()
    except RuntimeError:
        return True
    return False


def rules(bench: Bench, mode: PretendedTensors) -> None:
    """What the other roles rely on."""
    here, there, notes = torch.ones(4, 8), torch.ones(4, 8, device=CUDA), mode.notes
    index, mask = torch.tensor([0, 1]), torch.ones(4, dtype=torch.bool)
    assert _refused(lambda: here + there)
    assert _refused(lambda: torch.cat([here, there]))
    assert _refused(lambda: torch.nn.functional.linear(there, here))
    assert _refused(lambda: here[index.to(CUDA)])
    assert _refused(lambda: torch.nn.functional.scaled_dot_product_attention(here, there, there))
    assert (there + 1).device == CUDA
    assert (there.to(torch.bfloat16) @ there.T.to(torch.bfloat16)).dtype == torch.bfloat16
    notes.__init__()
    there.cpu(), there.sum().item(), there[mask.to(CUDA)], here.to(CUDA), there[index]
    assert sum(notes.waits.values()) == 6  # of two uploads, mask and index, too
    notes.__init__()
    pinned = here.pin_memory()
    assert pinned.is_pinned()
    assert not here.is_pinned()
    pinned.to(CUDA, non_blocking=True)
    torch.empty(4, 8, pin_memory=True).copy_(there, non_blocking=True)
    assert sum(notes.waits.values()) == 0
    here.to(CUDA, non_blocking=True)  # of pageable memory
    torch.cuda.synchronize()
    assert sum(notes.waits.values()) == 2
    assert sum(copies.nbytes for copies in notes.uploads.values()) == 2 * here.nbytes
    numbers = torch.tensor([3, 1, 2], device=CUDA)
    assert numbers.tolist() == [3, 1, 2]  # integers keep their numbers
    assert numbers.argsort().cpu().tolist() == [1, 2, 0]


# -- text, teachers, VAE, evaluation --------------------------------------------------------------------------


def text(bench: Bench, mode: PretendedTensors) -> None:
    """Text encoders of both models, as the actors of the data pipeline run them, and as a set of pairs is encoded."""
    encoder = PromptEncoder({"student": bench.student.folder, "teacher": bench.teacher.folder}, "bfloat16", "cuda")
    columns = encoder({"prompt": np.array(CAPTIONS, dtype=object)})
    for name, value in bench.tables["teacher"].items():
        assert columns[f"teacher.{name}"].shape == tuple(value.shape), name
    assert PromptTable(bench.teacher, CAPTIONS, torch.bfloat16, CUDA).columns is not None


TEACHERS = TeacherServiceConfig(dtype="bfloat16", slice=2)


def rank_of(bench: Bench, teacher: Any) -> TeacherRank:
    """One rank with its teacher; the rest of `TeacherRank.load` is about the group."""
    rank = object.__new__(TeacherRank)
    rank.rank, rank.world, rank.memory, rank.device = 0, 1, Memory(), CUDA
    rank.dtype, rank.slice_size, rank.space, rank.teacher = torch.bfloat16, 2, bench.teacher, teacher
    return rank


def _whole(bench: Bench) -> Any:
    """As `plain.Whole` holds it; the pretended device cannot be loaded onto without main memory in between."""
    return SimpleNamespace(network=bench.teacher.load_network(torch.bfloat16).to(CUDA))


def _ask(bench: Bench, rank: TeacherRank, samples: bool) -> None:
    if samples:
        answer = rank.sample(
            GenerateRequest(bench.latents(), bench.tables["teacher"], bench.empty, 2, bench.scale).payload()
        )
    else:
        t_B = torch.tensor([0.1, 0.4, 0.6, 0.9])
        answer = rank.predict_x0(
            ScoreRequest(bench.latents(), t_B, bench.tables["teacher"], bench.empty, bench.scale).payload()
        )
    assert answer.shape == (4 // rank.world, *bench.teacher.latent_shape)


def score(bench: Bench, mode: PretendedTensors) -> None:
    _ask(bench, rank_of(bench, _whole(bench)), samples=False)


def sample(bench: Bench, mode: PretendedTensors) -> None:
    _ask(bench, rank_of(bench, _whole(bench)), samples=True)


def zero3(bench: Bench, mode: PretendedTensors) -> None:
    """A rank of two with DeepSpeed's own code, on a process group that moves nothing."""
    import deepspeed  # it looks for CUDA when it is imported
    from deepspeed.runtime.zero import partitioned_param_coordinator

    from raydistill.teachers import zero3  # as deepspeed

    world = 2
    _fake_group(world)
    deepspeed.comm.comm.cdb = None
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None  # of ranks that are not there
    torch.Tensor.record_stream = lambda self, stream: None
    zero3.init_process_group(0, world, None, CUDA)
    rank = rank_of(bench, zero3.Partitioned(bench.teacher, TEACHERS, CUDA, 0, world))
    rank.world = world
    held = [p.ds_tensor for p in rank.teacher.network.parameters()]
    assert {(p.device, p.dtype) for p in held} == {(CUDA, torch.bfloat16)}
    assert {b.device for b in rank.teacher.network.buffers()} <= {CUDA}
    _ask(bench, rank, samples=False)
    _ask(bench, rank, samples=True)
    zero3.release(rank.teacher.network)


def vae(bench: Bench, mode: PretendedTensors) -> None:
    """Latents and pictures into pairs, by the mean and by a sample of the posterior."""
    side = bench.teacher.resolution
    for posterior in ("mean", "sample"):
        encoder = PairEncoder(bench.teacher, bench.student, "cuda", posterior)
        common = {"row": np.arange(4), "failure": np.full(4, "", dtype=object)}
        encode_rows(encoder, common | {"latents": bench.latents().numpy()})
        columns = encode_rows(encoder, common | {"pixels": np.zeros((4, 3, side, side), np.uint8)})
        assert columns["z_T"].shape == (4, *bench.teacher.latent_shape)


class FourPrompts:
    """`FixedPrompts` of the captions."""

    captions = CAPTIONS

    def batches(self, size: int) -> Any:
        yield 0, 4, CAPTIONS

    def noise(self, space: Any, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, *space.latent_shape)


def evaluation(bench: Bench, mode: PretendedTensors) -> None:
    worker = bench.distiller("student.ema_decay=0.99")
    settings = bench.config("evaluation.judge=null").evaluation
    pictures = StudentEvaluator(bench.student, FourPrompts(), settings, CUDA).draw(worker.networks.evaluated, 999)
    assert pictures.device.type == "cpu"
    assert len(pictures) == 4


# -- training -----------------------------------------------------------------------------------------------------


def _update(worker: Distiller) -> Distiller:
    distillation_step(worker, answered, worker.config.fake_score.updates, overlap=True)
    assert {"loss/vsd", "loss/gan", "loss/fake", "student/grad_norm"} <= worker.pop_metrics().keys()
    return worker


def update(bench: Bench, mode: PretendedTensors) -> None:
    """LoRA, two parts, one update of the fake score; the student is in bfloat16 too. The update alone is noted."""
    worker = bench.distiller("student.start_timestep=625", IN_PARTS)
    mode.notes.__init__()
    _update(worker)


def update_full(bench: Bench, mode: PretendedTensors) -> None:
    """The whole copy is trained, the discriminator shapes its features, and activations are recomputed."""
    _update(
        bench.distiller(
            "fake_score.kind=full", "student.ema_decay=0.99", "discriminator.fake_weight=0.1",
            "discriminator.depths=[0.3,1]", "discriminator.standardize=true", "discriminator.r1_weight=1",
            "distill.gradient_checkpointing=true", "student.start_timestep=999",
        )
    )  # fmt: skip


def update_student_lora(bench: Bench, mode: PretendedTensors) -> None:
    """The student is a LoRA on its frozen start, with an average; another worker goes on from its checkpoint."""
    settings = ("student.kind=lora", "student.rank=4", "student.ema_decay=0.99", "distill.gradient_checkpointing=true")
    settings += ("fake_score.updates=2",)
    state = _read_back(_update(bench.distiller(*settings)).state_dict())
    worker = bench.distiller(*settings)
    worker.load_state_dict(state)
    assert {p.device for p in worker.networks.ema.parameters()} == {CUDA}
    _update(worker)


def update_few_steps(bench: Bench, mode: PretendedTensors) -> None:
    """A student of four steps: of some samples the earlier ones run first. The update alone is noted."""
    worker = bench.distiller("student.steps=4", "student.start_timestep=625", IN_PARTS)
    mode.notes.__init__()
    _update(worker)


def update_reward(bench: Bench, mode: PretendedTensors) -> None:
    """A reward of what ships, whose decoder is recomputed, of all samples one by one. The update alone is noted."""
    settings = ("reward.metric=judge", "reward.weight=1", "distill.gradient_checkpointing=true", "fake_score.updates=1")
    reward = load_reward(bench.config(*settings), bench.student, {"judge": str(WEIGHTS / "judge")})
    bench.tables |= {"reward": {"attributes": attributes_of(CAPTIONS)}}
    worker = bench.distiller(*settings, reward=reward)
    assert {p.device for p in worker.reward.model.parameters()} == {CUDA}
    mode.notes.__init__()
    _update(worker)


def update_truncated(bench: Bench, mode: PretendedTensors) -> None:
    _update(bench.distiller("fake_score.kind=truncated"))


def update_joint(bench: Bench, mode: PretendedTensors) -> None:
    """The Bridge is trained along."""
    _update(bench.distiller("bridge.trainable=true", "bridge.mixed_precision=true"))


def update_float16(bench: Bench, mode: PretendedTensors) -> None:
    """The student from t = 999 in float16, with an average; another worker has its checkpoint. The update is noted."""
    settings = ("student.autocast=float16", "student.ema_decay=0.99", IN_PARTS)
    worker = bench.distiller(*settings)
    mode.notes.__init__()
    dtypes = []
    for block in (worker.networks.student.mid_block, worker.networks.student.conv_out):
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    _update(worker)
    mode.notes = Notes()  # of what follows nobody wants to know
    state = _read_back(worker.state_dict())
    assert set(dtypes[0::2]) == {torch.float16}
    assert set(dtypes[1::2]) == {torch.float32}
    bench.distiller(*settings).load_state_dict(state)


def update_shared(bench: Bench, mode: PretendedTensors) -> None:
    """One pass of the fake score for scores and features, recomputed; its own updates take one part of two."""
    _update(
        bench.distiller(
            "discriminator.shared_pass=true", "fake_score.batch_size=2", "distill.gradient_checkpointing=true", IN_PARTS
        )
    )


def update_float32(bench: Bench, mode: PretendedTensors) -> None:
    _update(bench.distiller("distill.mixed_precision=false"))


def update_shard(bench: Bench, mode: PretendedTensors) -> None:
    """FSDP2 of the frozen copy among eight workers, whose collectives move nothing."""
    worker = _of_eight(bench, "fake_score.shard=true", "fake_score.base_dtype=bfloat16")
    _are_cut(worker.networks.fake.network)
    _update(worker)


def update_student_shard(bench: Bench, mode: PretendedTensors) -> None:
    """FSDP2 of the student and its average among eight workers. The update alone is noted."""
    worker = _of_eight(bench, "student.shard=true", "student.ema_decay=0.99")
    _are_cut(worker.networks.student)
    _are_cut(worker.networks.ema)
    mode.notes.__init__()
    _update(worker)
    for kept in worker.gradients.optimizers["student"].state.values():
        assert {value.device for key, value in kept.items() if key != "step"} == {CUDA}


def _are_cut(network: torch.nn.Module) -> None:
    held = list(network.parameters())
    assert sum(hasattr(p, "to_local") for p in held) > len(held) / 4
    assert {(p.to_local() if hasattr(p, "to_local") else p).device for p in held} == {CUDA}


def _of_eight(bench: Bench, *settings: str) -> Distiller:
    """One of eight workers that share networks, whose collectives move nothing."""
    _fake_group(8)
    partition, plain = sharding.partition, torch.nn.Module.to

    def moved_to(module: Any, *device: Any, **others: Any) -> Any:
        return _moved(module) if device == (CUDA,) and not others else plain(module, *device, **others)

    def moved_and_cut(parts: Any, mesh: Any, **how: bool) -> None:
        partition([_moved(part) for part in parts], mesh, **how)

    fake_score.partition = sharding.partition = moved_and_cut
    torch.nn.Module.to = moved_to  # FSDP2 and `Module.to` swap what a parameter holds, which fakes do not follow
    try:
        settings += ("distill.workers=8", "distill.gradient_checkpointing=true", IN_PARTS)
        return bench.distiller(*settings, mesh=init_device_mesh("cuda", (8,)))
    finally:
        fake_score.partition, sharding.partition, torch.nn.Module.to = partition, partition, plain


def _fake_group(world: int) -> None:
    """A process group of which this is rank 0."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def _moved(module: Any) -> Any:
    """`module.to(CUDA)` by new parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor) and not hasattr(parameter, "to_local"):
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(CUDA), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(CUDA)
    return module


def _read_back(state: Any) -> Any:
    """As a checkpoint gives it: on the CPU."""
    return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, state)


def resume(bench: Bench, mode: PretendedTensors) -> None:
    """Another worker goes on from a checkpoint, with everything on its device."""
    state = _read_back(_update(bench.distiller("student.ema_decay=0.99")).state_dict())
    worker = bench.distiller("student.ema_decay=0.99")
    worker.load_state_dict(state)
    for name, optimizer in worker.gradients.optimizers.items():
        for kept in optimizer.state.values():
            assert {value.device for key, value in kept.items() if key != "step"} == {CUDA}, name
    _update(worker)
    worker.networks.load_best_state(_read_back(worker.networks.best_state()))


def bridge(bench: Bench, mode: PretendedTensors) -> None:
    """A Bridge's step in two parts, which is what is noted."""
    config = bench.config("bridge.micro_batches=2", "bridge.gradient_checkpointing=true", "bridge.mixed_precision=true")
    objective = build_objective(config, bench.pairs, CUDA)
    trainer = BridgeTrainer(Bridge.create(bench.student, bench.teacher, config.bridge), objective)
    batch = objective.batch(0)
    mode.notes.__init__()
    losses = trainer.step(batch)
    assert {"loss/bridge", "loss/attention", "loss/latent_l1"} <= losses.keys()


def bridge_resumed(bench: Bench, mode: PretendedTensors) -> None:
    """A validation, and a step after a resume."""
    config = bench.config("bridge.mixed_precision=true", "bridge.projector=unet")
    objective = build_objective(config, bench.pairs, CUDA)
    trainer = BridgeTrainer(Bridge.create(bench.student, bench.teacher, config.bridge), objective)
    trainer.step(objective.batch(0))
    trainer.validation()
    trainer.load_state_dict(_read_back(trainer.state_dict()))
    trainer.step(objective.batch(1))


ROLES: dict[str, Role] = {
    role.__name__: role
    for role in (
        rules, text, score, sample, zero3, vae, evaluation, update, update_full, update_float16, update_student_lora,
        update_few_steps, update_reward, update_truncated, update_joint,
        update_float32, update_shared, update_shard, update_student_shard, resume, bridge,
        bridge_resumed,
    )
}  # fmt: skip
NUMBERS = {
    rules,
    text,
    score,
    sample,
    vae,
    evaluation,
    update_float32,
    bridge_resumed,
}  # what is not finite would be seen
