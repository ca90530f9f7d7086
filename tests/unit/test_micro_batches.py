"""Batches in parts: the update of the whole batch, the noise of the whole batch, requests that are bounded."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mean_of_two import averaging

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import build_objective
from raydistill.config.reading import load
from raydistill.data.pairs import write_pairs
from raydistill.distillation.batches import Real
from raydistill.distillation.schedule import Requests, distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.driver.preflight import check_inputs
from raydistill.driver.run_folder import create_run_folder, open_run_folder
from raydistill.errors import InputError
from raydistill.planning.meter import Meter

CAPTIONS = [
    "a small red circle at the left on a white background",
    "a large blue square at the top on a gray background",
]
SMALL = (
    "bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "fake_score.rank=4", "fake_score.updates=2",
    "discriminator.width=8", "student.lr=1e-3", "fake_score.lr=1e-3", "discriminator.lr=1e-2", "distill.batch_size=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables(spaces):
    return [space.encode_prompts(space.load_text(), [*CAPTIONS, ""]) for space in spaces]


def batches(tables, size):
    for slot in itertools.count():
        ids = list(range(slot * size, slot * size + size))
        rows = [i % len(CAPTIONS) for i in ids]
        yield {"sample_id": ids} | {
            f"{role}.{name}": value[rows].numpy()
            for role, table in zip(("student", "teacher"), tables, strict=True)
            for name, value in table.items()
        }


@pytest.fixture
def build(spaces, tables):
    """`build(*overrides, device, anchor)` -> a worker with random weights that are the same each time."""

    def start(*overrides, device="cpu", anchor=None, rows=None, average=lambda tensors: None, **parts):
        config = load(overrides=[*SMALL, *overrides])
        student, teacher = spaces
        latents = torch.randn(8, *teacher.latent_shape, generator=torch.Generator().manual_seed(5))
        real = Real(latents, tables[1], torch.arange(8) % len(CAPTIONS))
        torch.manual_seed(7)
        bridge = Bridge.create(student, teacher, config.bridge)
        stream = batches(tables, config.distill.batch_size)
        if rows is not None:  # those of a worker
            stream = ({name: column[rows] for name, column in batch.items()} for batch in stream)
        unet, network = student.load_network(), teacher.load_network()
        return build_distiller(
            config,
            student_space=student,
            teacher_space=teacher,
            student=unet,
            bridge=bridge,
            fake_network=network,
            real=real,
            source=stream,
            average=average,
            device=device,
            anchor=anchor,
            **parts,
        )

    return start


class Answer:
    def __init__(self, scores):
        self.scores, self.taken = scores, False

    def result(self):
        self.taken = True
        return self.scores

    def ready(self):
        return False


@pytest.fixture(scope="module")
def submit(spaces, tables):
    """The dense teacher in this process."""
    space, network = spaces[1], spaces[1].load_network()
    empty = {name: value[len(CAPTIONS) :] for name, value in tables[1].items()}

    @torch.no_grad()
    def score(made):
        return Answer(space.predict_x0(network, made.x_t, made.t_B, made.teacher_conditioning, empty, 3.0))

    return score


def gradients_of(distiller, submit, overlap=True):
    """Gradients of each optimizer's first update, before clipping, and what was noised for the teachers."""
    taken, seen, step = {}, [], distiller.gradients.step

    def spy(**norms):
        for name in norms:
            flat = [
                p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel())
                for p in distiller.gradients.parameters(name)
            ]
            taken.setdefault(name, torch.cat(flat))
        return step(**norms)

    def noticed(made):
        seen.append(made)
        return submit(made)

    distiller.gradients.step = spy
    distillation_step(distiller, noticed, 1, overlap)
    return taken, seen


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_mean_gradient_of_the_parts_is_the_batchs(build, submit, parts):
    whole, one = gradients_of(build(), submit)
    divided, several = gradients_of(build(f"distill.micro_batches={parts}"), submit)
    assert whole.keys() == divided.keys() == {"student", "fake", "discriminator"}
    for name, gradient in whole.items():
        assert gradient.norm() > 0
        assert (divided[name] - gradient).norm() <= 2e-4 * gradient.norm(), name
    assert [len(made.x_t) for made in several] == [8 // parts] * parts
    for field in ("sample_ids", "seen", "t_B"):  # a sample's numbers do not depend on how its batch is divided
        assert torch.equal(torch.cat([getattr(made, field) for made in several]), getattr(one[0], field))
    torch.testing.assert_close(torch.cat([made.x_t for made in several]), one[0].x_t, rtol=1e-4, atol=1e-4)


def test_workers_with_more_and_fewer_parts_average_to_the_same_gradient(build, submit):
    """One worker with a quarter of the samples, one with the rest, as when two have to do what four did."""
    whole, _ = gradients_of(build(), submit)
    of_rank = averaging()
    shares = ((slice(0, 2), 1), (slice(2, 8), 3))
    workers = [
        build(rows=rows, average=of_rank(rank), micro_batches=parts, mean_micro_batches=2.0)
        for rank, (rows, parts) in enumerate(shares)
    ]
    with ThreadPoolExecutor(2) as pool:
        (first, _), (second, _) = pool.map(lambda worker: gradients_of(worker, submit), workers)
    for name, gradient in whole.items():
        assert ((first[name] + second[name]) / 2 - gradient).norm() <= 2e-4 * gradient.norm(), name
    drifts = [worker.pop_metrics()["guard/latent_drift"] for worker in workers]
    assert drifts[0] == drifts[1]


def without_what_is_dropped(source):
    """As the stream brings it: four samples of the fake score's eight."""
    for slot, batch in enumerate(source):
        yield {name: column[: 4 if slot % 2 else None] for name, column in batch.items()}


def test_an_update_of_the_fake_score_may_take_fewer_samples_than_the_students(build, submit):
    """Whole micro-batches, the first of a worker: their mean gradient, whatever their size, and whether more are brought."""
    found = []
    for parts in (2, 4):
        distiller = build("fake_score.batch_size=4", "fake_score.updates=1", f"distill.micro_batches={parts}")
        if parts == 4:
            distiller.batches.source = without_what_is_dropped(distiller.batches.source)
        found.append(gradients_of(distiller, submit)[0])
        students, fakes = distiller.batches.pop_sample_ids()
        assert (students, fakes) == ([*range(8)], [8, 9, 10, 11])
    whole = gradients_of(build("fake_score.updates=1", "distill.micro_batches=2"), submit)[0]
    for name in ("student", "fake", "discriminator"):
        assert (found[1][name] - found[0][name]).norm() <= 2e-4 * found[0][name].norm() > 0, name
    assert (whole["fake"] - found[0]["fake"]).norm() > 0.1 * whole["fake"].norm()
    # as of a worker that has these four samples alone
    alone = gradients_of(
        build("fake_score.updates=1", rows=slice(0, 4), micro_batches=1, mean_micro_batches=1.0), submit
    )[0]
    assert (alone["fake"] - found[0]["fake"]).norm() <= 2e-4 * alone["fake"].norm()


def test_what_fewer_workers_take_of_it_averages_to_the_same_gradient(build, submit):
    """Two that take the first of their two parts each; then one has one part and the other three."""

    def fake_gradient(**parts):
        distiller, rows = build("fake_score.updates=1", **parts), []
        distiller.gradients.step = lambda **_: None
        distiller.fake_update()
        for name in ("fake", "discriminator"):
            rows += [p.grad.flatten() for p in distiller.gradients.parameters(name) if p.grad is not None]
        return torch.cat(rows)

    whole = fake_gradient(
        micro_batches=4, mean_micro_batches=4.0, fake_micro_batches=[0, 2], mean_fake_micro_batches=2.0
    )
    shares = ((slice(0, 2), 1, [0]), (slice(2, 8), 3, [1]))
    mean = sum(
        fake_gradient(
            rows=rows,
            micro_batches=parts,
            mean_micro_batches=2.0,
            fake_micro_batches=chosen,
            mean_fake_micro_batches=1.0,
        )
        for rows, parts, chosen in shares
    )
    assert (mean / 2 - whole).norm() <= 2e-4 * whole.norm() > 0


@pytest.mark.parametrize("fake", [3, 16])
def test_a_fake_batch_of_broken_parts_or_too_many_samples_is_refused(fake):
    with pytest.raises(
        InputError, match=rf"fake_score\.batch_size={fake}: it must be a multiple of a micro-batch of 2"
    ):
        load(overrides=["distill.batch_size=8", "distill.micro_batches=4", f"fake_score.batch_size={fake}"])


def flat(state):
    if isinstance(state, torch.Tensor):
        return [state.flatten().double()]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [leaf for value in values for leaf in flat(value)]


@pytest.mark.full
def test_overlap_changes_no_bit_of_a_batch_in_parts(build, submit):
    states = []
    for overrides, overlap in (((), True), (("distill.in_flight=1",), True), ((), False)):
        distiller = build("distill.micro_batches=4", *overrides)
        for _ in range(2):
            distillation_step(distiller, submit, 2, overlap)
        states.append((torch.cat(flat(distiller.state_dict())), distiller.pop_metrics()))
    for weights, metrics in states[1:]:
        assert torch.equal(states[0][0], weights)
        for name in ("loss/vsd", "loss/gan", "loss/fake", "loss/discriminator", "guard/latent_drift"):
            assert metrics[name] == states[0][1][name]


class Teacher:
    """Notes how many requests are under way; each answers once `finish` has said so."""

    def __init__(self):
        self.requests, self.most = [], 0

    def __call__(self, made):
        teacher = self

        class Request(Answer):
            def ready(self):
                return self.taken

            def result(self):
                self.taken = True
                return self.scores

        self.requests.append(Request(made))
        self.most = max(self.most, sum(not request.taken for request in teacher.requests))
        return self.requests[-1]


def test_later_requests_are_sent_before_the_first_answer_is_awaited_and_never_more_than_in_flight():
    teacher, scores = Teacher(), torch.arange(5)
    requests = Requests(teacher, in_flight=3)
    for score in scores:
        requests.add(score)
        requests.send()
    assert len(teacher.requests) == 3
    teacher.requests[1].taken = True  # answered out of order: another one may go
    requests.send()
    assert len(teacher.requests) == 4
    answers = iter(requests)
    assert next(answers) == 0
    assert len(teacher.requests) == 5  # sent before the caller works on the first answer
    assert [int(score) for score in answers] == [1, 2, 3, 4]
    assert teacher.most == 3


def test_every_request_of_a_batch_is_sent_before_the_fake_updates_and_before_any_is_awaited(build, submit):
    distiller = build("distill.micro_batches=4")
    order, update = [], distiller.fake_update

    def noticed(made):
        order.append("sent")
        pending = submit(made)
        result = pending.result
        pending.result = lambda: order.append("awaited") or result()
        return pending

    distiller.fake_update = lambda: order.append("fake") or update()
    distillation_step(distiller, noticed, 2, overlap=True)
    assert order == ["sent"] * 4 + ["fake"] * 2 + ["awaited"] * 4
    order.clear()
    distillation_step(distiller, noticed, 2, overlap=False)
    assert order == ["fake"] * 2 + ["sent"] * 4 + ["awaited"] * 4


@pytest.mark.full
def test_a_bridge_trained_along_learns_from_its_pairs_in_parts(build, submit, spaces, tmp_path):
    generator = torch.Generator().manual_seed(9)
    z_student, z_teacher = (torch.randn(24, *space.latent_shape, generator=generator) for space in spaces)
    write_pairs(
        tmp_path,
        0,
        prompts=[f"{CAPTIONS[0]} {i}" for i in range(24)],
        prompt_ids=list(range(24)),
        seeds=[0] * 24,
        z_teacher=z_teacher,
        z_student=z_student,
    )
    settings = (
        "bridge.trainable=true", "bridge.batch_size=8", f"student.model={spaces[0].folder}",
        f"teacher.model={spaces[1].folder}",
    )  # fmt: skip
    found = []
    for parts in (1, 4):
        overrides = (*settings, f"distill.micro_batches={parts}")
        anchor = build_objective(load(overrides=[*SMALL, *overrides]), tmp_path)
        found.append(gradients_of(build(*overrides, anchor=anchor), submit)[0]["bridge"])
    assert (found[1] - found[0]).norm() <= 2e-4 * found[0].norm() > 0


@pytest.mark.full
def test_the_peak_of_memory_is_that_of_a_part(build, submit, tables):
    """Live bytes beyond what is held, of the updates; the inputs of the whole batch lie in main memory."""
    peaks = []
    for parts in (1, 4):
        distiller = build(f"distill.micro_batches={parts}", "distill.batch_size=16")
        with Meter("cpu") as memory:
            made = list(distiller.make())
            scores = [submit(part).result() for part in made]
            fake = memory.count(distiller.fake_update).peak
            before = memory.live
            student = memory.count(lambda d=distiller, m=made, s=scores: d.student_update(m, s)).peak - before
        trained = sum(p.nbytes for p in distiller.networks.student.parameters())
        peaks.append((fake, student - 3 * trained))  # without gradients and Adam's moments
    assert peaks[1][0] < 0.6 * peaks[0][0]
    assert peaks[1][1] < 0.5 * peaks[0][1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["distill.batch_size=16", "distill.micro_batches=3"],
            r"distill\.batch_size = 16 cannot be divided by 3; set distill\.micro_batches to 2 or 4",
        ),
        (["distill.batch_size=4", "distill.micro_batches=8"], r"to 2 or 4, or change distill\.batch_size"),
        (
            ["distill.batch_size=16", "distill.micro_batches=8", "bridge.trainable=true", "bridge.batch_size=12"],
            r"bridge\.batch_size / distill\.workers = 12 cannot be divided by 8; .* to 2 or 4, or",
        ),
        (
            ["bridge.checkpoint=null", "bridge.batch_size=12", "bridge.micro_batches=5", "distill.workers=2"],
            r"bridge\.micro_batches: bridge\.batch_size / distill\.workers = 6 cannot be divided by 5; .* to 3 or 6, or",
        ),
    ],
)
def test_a_batch_that_has_no_such_parts_is_refused_with_those_it_has(overrides, message, tmp_path):
    with pytest.raises(InputError, match=message):
        check_inputs(load(overrides=[f"storage={tmp_path}", *overrides]))


def test_a_resume_may_change_requests_and_alarms_but_neither_parts_nor_precision(tmp_path):
    settings = [f"storage={tmp_path}", "run.name=a", "distill.micro_batches=2"]
    config = load(overrides=settings)
    create_run_folder(open_run_folder(config), config)
    free = ("distill.in_flight=1", "distill.drift_limit=0.5", "distill.stop_on_collapse=true")
    open_run_folder(load(overrides=[*settings, *free]))
    for other in ("distill.micro_batches=4", "distill.mixed_precision=true"):
        with pytest.raises(InputError, match=other.split("=")[0]):
            open_run_folder(load(overrides=[*settings, other]))
