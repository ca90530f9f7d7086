"""A student in float16 with scaled gradients: the gradient of float32, and an overflow that changes nothing but the scale."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from mean_of_two import averaging
from test_distill_mixed_precision import Shipped, cosine
from test_updates import LocalTeacher, configuration, flat, make_distiller
from torch import nn
from torch.optim import AdamW
from torch.utils._pytree import tree_map

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.distillation import gradient_scale
from raydistill.distillation.finite import Finite
from raydistill.distillation.gradient_scale import GradientScale
from raydistill.distillation.gradients import Gradients
from raydistill.distillation.networks import Networks
from raydistill.distillation.schedule import distillation_step
from raydistill.errors import GradientOverflow, InputError
from raydistill.precision import stay_float32
from raydistill.spaces import load_space
from raydistill.spaces.adapter import copy_of

FLOAT16 = ("distill.mixed_precision=true", "student.autocast=float16")


@pytest.fixture
def norms_as_on_cuda(monkeypatch):
    """CUDA's autocast computes norms in float32, the CPU's does not."""

    def in_float32(plain):
        def norm(x, *args, **settings):
            if x.dtype != torch.float16:
                return plain(x, *args, **settings)
            with torch.autocast("cpu", enabled=False):
                return plain(x.float(), *args, **settings)

        return norm

    for name in ("group_norm", "layer_norm"):
        monkeypatch.setattr(F, name, in_float32(getattr(F, name)))


@pytest.mark.full
def test_in_float16_the_gradient_is_that_of_float32_where_bfloat16_would_turn_it(norms_as_on_cuda):
    """From t = 999, where bfloat16 has a cosine of 0.969, and TF32 0.9998 (test_distill_mixed_precision.py)."""
    late = Shipped("sd15", "flux", 999)
    _, exact = late.step()
    worker, rounded = late.step(*FLOAT16)
    metrics = worker.pop_metrics()
    scale = metrics["student/gradient_scale"]
    assert scale == 2**16 / 2 ** metrics.get("guard/overflows", 0)
    assert metrics["student/grad_norm"] == pytest.approx(exact["student"].norm().item(), rel=0.02)
    assert not torch.equal(rounded["student"] / scale, exact["student"]), "nothing ran in float16"
    assert cosine(rounded["student"], exact["student"]) > 0.9995
    assert {p.dtype for p in worker.networks.student.parameters()} == {torch.float32}


def networks_of(student, teacher):
    small = [
        "bridge.embed_dim=16",
        "bridge.depths=[1]",
        "bridge.heads=2",
        "fake_score.rank=2",
        "discriminator.weight=0",
    ]
    config = load(overrides=[*small, *FLOAT16])
    return Networks(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=Bridge.create(student, teacher, config.bridge),
        fake_network=teacher.load_network(),
    )


def worker_of(spaces, tables, **changes):
    return make_distiller(
        configuration(distill__mixed_precision="true", student__autocast="float16", fake_score__updates=1, **changes),
        spaces,
        tables,
    )


def step(worker, spaces, tables):
    teacher = LocalTeacher(spaces[1], {name: value[3:] for name, value in tables[1].items()})
    distillation_step(worker, teacher, 1, overlap=True)
    return worker


def test_an_update_that_overflows_is_done_again_with_half_the_scale_and_has_the_bits_of_that_scale(spaces, tables):
    """No update is left out and no sample."""
    high, low = worker_of(spaces, tables), worker_of(spaces, tables)
    high.gradients.scale.value = 2.0**32
    step(high, spaces, tables)
    low.gradients.scale.value = fits = high.gradients.scale.value
    step(low, spaces, tables)
    assert torch.equal(flat(low.networks.student), flat(high.networks.student))
    metrics = high.pop_metrics()
    assert metrics["student/gradient_scale"] == fits == 2.0 ** (32 - metrics["guard/overflows"])
    assert metrics["guard/overflows"] >= 1
    assert "guard/left_out" not in metrics
    assert "guard/overflows" not in low.pop_metrics()


class TwoWorkers:
    """Of which the second one's gradient may be too large, or a value of a sample's not finite."""

    def __init__(self, tolerant=False):
        self.networks, self.gradients, of_rank = [], [], averaging()
        for rank in range(2):
            torch.manual_seed(0)
            network = nn.Linear(3, 2)
            optimizer = AdamW(network.parameters(), lr=1.0)
            own = Gradients({"student": optimizer}, 1, Finite(), of_rank(rank), scale=GradientScale())
            own.tolerant = tolerant
            self.networks.append(network)
            self.gradients.append(own)

    def update(self, size=1.0, sample=0.0):
        """Errors of each; `size`: of the second one's gradient, `sample`: a value of its second sample."""

        def work(rank):
            gradients = self.gradients[rank]

            def phase():
                gradients.finite.of(torch.tensor([4, 5]))
                value = torch.tensor([[1.0], [1.0 + sample if rank else 1.0]])
                gradients.finite.note(value, "the teacher's score")
                found = gradients.scale.enter(self.networks[rank](torch.ones(2, 3)))
                gradients.accumulate((found * value).mean() * (size if rank else 1.0), "student")
                return gradients.step(student=1.0)

            gradients.scaled(phase, ["student"])

        with ThreadPoolExecutor(2) as pool:
            return [one.exception(60) for one in [pool.submit(work, rank) for rank in range(2)]]

    def scales(self):
        return [one.scale.value for one in self.gradients]


def test_an_overflow_of_one_worker_is_one_of_all():
    """The second one's gradient is infinite at 2^70, in float32 here. Its squares are at 2^69, which is no overflow."""
    both = TwoWorkers()
    for one in both.gradients:
        one.scale.value = 2.0**70
    assert both.update(size=2.0**59) == [None, None]
    assert both.scales() == [2.0**69] * 2
    assert torch.equal(*(flat(network) for network in both.networks))
    before = flat(both.networks[0]).clone()
    both.networks[1].weight.register_hook(lambda gradient: gradient * float("nan"))  # at any scale
    errors = both.update()
    assert both.scales() == [1.0] * 2
    assert [str(error).partition(":")[0] for error in errors] == [
        "another worker's part of the student gradient", "the student gradient",
    ]  # fmt: skip
    assert torch.equal(before, flat(both.networks[0]))


@pytest.mark.parametrize("tolerant", [False, True])
def test_a_value_that_is_not_finite_is_no_overflow_on_any_worker(tolerant):
    """Nobody tries another scale: its samples may be left out, or it ends the run."""
    both = TwoWorkers(tolerant)
    errors = both.update(sample=float("nan"))
    assert both.scales() == [2.0**16] * 2
    assert not any(isinstance(error, GradientOverflow) for error in errors)
    assert str(errors[1]) == "the teacher's score: not finite in samples [1] of 2 (sample ids [5])"
    assert [error.elsewhere for error in errors] == [True, False]
    assert [error.samples for error in errors] == [() if tolerant else None, [5]]


@pytest.mark.full
def test_a_resume_goes_on_with_the_scale_and_the_bits(spaces, tables, monkeypatch):
    monkeypatch.setattr(gradient_scale, "GROWS_AFTER", 2)
    whole = worker_of(spaces, tables)
    step(whole, spaces, tables)
    state = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, whole.state_dict())
    step(whole, spaces, tables)
    resumed = worker_of(spaces, tables)
    for _ in range(2):
        resumed.batches.next()
    resumed.load_state_dict(state)
    step(resumed, spaces, tables)
    assert resumed.gradients.scale.state_dict() == whole.gradients.scale.state_dict()
    assert resumed.gradients.scale.value == 2 * state["gradient_scale"]["value"], "two updates, and it is doubled"
    assert torch.equal(flat(resumed.networks.student), flat(whole.networks.student))


def test_the_scale_stays_within_its_bounds():
    scale = GradientScale()
    scale.value = gradient_scale.MOST
    for _ in range(gradient_scale.GROWS_AFTER):
        scale.run(lambda: None, lambda: None)
    assert scale.value == gradient_scale.MOST


def test_the_last_layer_of_a_copy_is_the_copys_own(spaces):
    """The moving average is drawn with, and must not answer with the student's layer."""
    student = spaces[0].load_network()
    stay_float32(student.conv_out)
    copied, x = copy_of(student), torch.ones(1, student.conv_out.in_channels, 4, 4)
    with torch.no_grad():
        before = copied.conv_out(x)
        student.conv_out.weight.zero_()
        assert torch.equal(copied.conv_out(x), before)
        with torch.autocast("cpu", torch.float16):
            assert copied.conv_out(x.half()).dtype == torch.float32


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_the_last_layer_alone_computes_in_float32(family, spaces, diffusion_folders):
    """A transformer's too: from t = 999 PixArt's x0 multiplies what it rounds 157 times."""
    space = spaces[0] if family == "sd" else load_space(diffusion_folders["pixart"])
    networks, kinds = networks_of(space, spaces[1]), {}
    for name, module in networks.student.named_modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(lambda _, __, out, name=name: kinds.update({name: out.dtype}))
    text = {name: torch.zeros(1, *shape, dtype=kind) for name, (shape, kind) in space.conditioning_layout.items()}
    with torch.no_grad():
        networks.z_student(torch.randn(1, *space.latent_shape), text)
    last = {"sd": "conv_out", "pixart": "proj_out"}[family]
    assert kinds.pop(last) == torch.float32
    assert {kind for name, kind in kinds.items() if name.endswith(("to_q", "to_k", "to_v"))} == {torch.float16}


def test_float16_without_mixed_precision_is_refused():
    with pytest.raises(InputError, match=r"student\.autocast=float16 .*set distill\.mixed_precision=true"):
        load(overrides=["student.autocast=float16"])
