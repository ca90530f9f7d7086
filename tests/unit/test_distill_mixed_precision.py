"""bfloat16 autocast in distillation: gradients of the float32 step, float32 where it matters, no loss scaling."""

from __future__ import annotations

import itertools

import pytest
import torch
from answers import Answer
from lanes import full_but
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.data.encode import PromptEncoder
from raydistill.data.pairs import PairSet
from raydistill.distillation.batches import Real
from raydistill.distillation.networks import load_unet
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.precision import allow_tf32
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.one_step import x0_gain

SAMPLES = 8


class Shipped:
    """A shipped student with its teacher: trained weights, whose gradients are no noise."""

    def __init__(self, student, teacher, start):
        self.name, self.start = student, start
        self.teacher_name = teacher
        self.student, self.teacher = load_space(WEIGHTS / student), load_space(WEIGHTS / teacher)
        self.samples = PairSet(WEIGHTS / "samples" / teacher).rows(range(SAMPLES))
        prompts = [*self.samples.prompts, ""]
        self.tables = [space.encode_prompts(space.load_text(), prompts) for space in (self.student, self.teacher)]
        self.network = self.teacher.load_network()

    def batches(self):
        for slot in itertools.count():
            columns = {
                f"{role}.{name}": value[:SAMPLES].numpy()
                for role, table in zip(("student", "teacher"), self.tables, strict=True)
                for name, value in table.items()
            }
            yield {"sample_id": list(range(slot * SAMPLES, (slot + 1) * SAMPLES))} | columns

    def worker(self, *overrides):
        config = load(overrides=[f"student.start_timestep={self.start}", f"distill.batch_size={SAMPLES}", *overrides])
        bridge = Bridge.load(
            WEIGHTS / "bridge" / f"sd15-{self.teacher_name}", self.student, self.teacher
        )  # the students share a VAE
        unet = load_unet(self.student, f"shapes:{self.name}-onestep")
        real = Real(self.samples.z_teacher, self.tables[1], torch.arange(SAMPLES))
        network = self.teacher.load_network()
        return build_distiller(
            config,
            student_space=self.student,
            teacher_space=self.teacher,
            student=unet,
            bridge=bridge,
            fake_network=network,
            real=real,
            source=self.batches(),
        )

    @torch.no_grad()
    def submit(self, made):
        empty = {name: value[SAMPLES:] for name, value in self.tables[1].items()}
        scores = self.teacher.predict_x0(
            self.network, made.x_t, made.t_B, made.teacher_conditioning, empty, guidance_scale=3.5
        )
        return Answer(scores)

    def step(self, *overrides):
        """One step's worker, and each optimizer's gradient before clipping."""
        worker, taken = self.worker(*overrides), {}
        plain = worker.gradients.step

        def spy(**norms):
            for name in norms:
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in worker.gradients.parameters(name)]
                assert all(gradient.dtype == torch.float32 for gradient in grads)
                taken.setdefault(name, torch.cat([gradient.flatten() for gradient in grads]))
            return plain(**norms)

        worker.gradients.step = spy
        distillation_step(worker, self.submit, 1, overlap=True)
        return worker, taken


@pytest.fixture(scope="module")
def late():
    """From t = 999: sigma / alpha is 14.6."""
    return Shipped("sd15", "flux", 999)


@pytest.fixture(scope="module")
def early():
    """From t = 625."""
    return Shipped("sd21", "sdxl", 625)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


@pytest.mark.parametrize(("which", "in_bfloat16"), [("late", False), ("early", True)])
def test_gradients_point_where_those_of_float32_do(request, which, in_bfloat16):
    shipped = request.getfixturevalue(which)
    _, exact = shipped.step()
    worker, rounded = shipped.step("distill.mixed_precision=true")
    assert worker.networks.student_in_bfloat16 == in_bfloat16
    assert exact.keys() == rounded.keys() == {"student", "fake", "discriminator"}
    for name, gradient in exact.items():
        assert torch.isfinite(rounded[name]).all()
        assert not torch.equal(rounded[name], gradient), f"{name}: nothing ran in bfloat16"
        assert cosine(rounded[name], gradient) > 0.99, name
        assert rounded[name].norm().item() == pytest.approx(gradient.norm().item(), rel=0.05), name
    state = worker.state_dict()
    for part in ("student", "fake", "discriminator"):
        assert {value.dtype for value in state[part].values() if value.is_floating_point()} == {torch.float32}
    for optimizer in state["optimizers"].values():
        moments = [value for entry in optimizer["state"].values() for value in entry.values()]
        assert {value.dtype for value in moments} == {torch.float32}


def test_a_student_whose_x0_multiplies_rounding_must_stay_float32(late, monkeypatch):
    """What the exception is for: in bfloat16 its gradient is another one."""
    _, exact = late.step()
    monkeypatch.setattr("raydistill.distillation.networks.MAX_GAIN", 100.0)
    worker, rounded = late.step("distill.mixed_precision=true")
    assert worker.networks.student_in_bfloat16
    assert cosine(rounded["student"], exact["student"]) < 0.99


class Tf32(TorchDispatchMode):
    """Factors of float32 products rounded to 10 bits of mantissa, as TF32 does on CUDA; forwards and backwards."""

    PRODUCTS = {
        torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution,
        torch.ops.aten.convolution_backward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    }  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.PRODUCTS:
            args = tree_map(self._rounded, args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        return ((value.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_tf32_leaves_the_gradients_of_a_student_that_bfloat16_would_turn(late):
    """Emulated: this is why the ready configurations allow it where they keep the student out of bfloat16."""
    _, exact = late.step()
    with Tf32():
        _, rounded = late.step()
    for name, gradient in exact.items():
        assert not torch.equal(rounded[name], gradient), f"{name}: nothing was rounded"
        assert cosine(rounded[name], gradient) > 0.9995, name
        assert rounded[name].norm().item() == pytest.approx(gradient.norm().item(), rel=0.01), name


def test_tf32_is_allowed_and_forbidden_as_a_whole():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_gain_is_sigma_over_alpha_for_epsilon(late, early):
    for shipped in (late, early):
        alphas = shipped.student.path.alphas_cumprod
        expected = ((1 - alphas[shipped.start]) / alphas[shipped.start]).sqrt().item()
        assert x0_gain(shipped.student, shipped.start) == pytest.approx(expected, rel=1e-5)


def test_recomputed_activations_and_parts_keep_their_meaning_in_bfloat16(late):
    _, kept = late.step("distill.mixed_precision=true")
    _, recomputed = late.step("distill.mixed_precision=true", "distill.gradient_checkpointing=true")
    _, parts = late.step("distill.mixed_precision=true", "distill.micro_batches=4")
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name
        assert cosine(parts[name], gradient) > 0.999, name


@pytest.mark.parametrize("overrides", [[], ["distill.mixed_precision=true"]])
@pytest.mark.parametrize("which", full_but(["late", "early"], "late"))
def test_text_encoders_may_have_another_dtype_than_the_networks(request, which, overrides):
    """What they give in bfloat16 is, up to their rounding, what they give in float32; networks keep their own dtype."""
    shipped = request.getfixturevalue(which)
    folders = {"student": shipped.student.folder, "teacher": shipped.teacher.folder}
    columns = PromptEncoder(folders, dtype="bfloat16")({"prompt": shipped.samples.prompts})
    worker = shipped.worker(*overrides)
    worker.batches.source = ({"sample_id": list(range(8 * slot, 8 * slot + 8))} | columns for slot in itertools.count())
    made = list(worker.make())
    assert {value.dtype for value in made[0].student_conditioning.values()} == {torch.bfloat16}, "as it travels"
    assert made[0].x_t.dtype == torch.float32
    worker.fake_update()
    worker.student_update(made, [shipped.submit(part).result() for part in made])
    reference = shipped.worker(*overrides)
    expected = next(iter(reference.make())).x_t
    assert cosine(made[0].x_t.flatten(), expected.flatten()) > 0.999
