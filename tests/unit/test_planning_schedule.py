"""What the planner models from its counts: seconds, replicas, fits, prices, and what the job prints."""

from __future__ import annotations

import dataclasses

import pytest

from raydistill.config.reading import load
from raydistill.errors import InputError
from raydistill.planning import kept
from raydistill.planning import memory as memory_module
from raydistill.planning.counting import count, count_run, count_trainer
from raydistill.planning.counts import Cost, Text, Wanted, changed, wanted
from raydistill.planning.gpus import GIB, read_gpus
from raydistill.planning.memory import SHARDS, teacher_bytes, trainer_bytes, trainer_remedies
from raydistill.planning.report import details
from raydistill.planning.schedule import bridge_schedule, phases, price, request_seconds, schedule
from raydistill.planning.verdict import savings, verdict
from raydistill.spaces.meta import open_space

BATCH = 4


@pytest.fixture(scope="module")
def config():
    return load(overrides=[f"distill.batch_size={BATCH}", "bridge.checkpoint=null", f"teachers.slice={BATCH}"])


@pytest.fixture(scope="module")
def counts(config):
    return count_run(config)


# -- arithmetic on the counts -----------------------------------------------------------------------------


def text_of(flops):
    return {"teacher text_encoder": Text(1, Cost(flops, 0, flops), 16)}


def priced(config, **plan):
    return config.model_copy(update={"plan": config.plan.model_copy(update=plan)})


@pytest.fixture(scope="module")
def large(counts):
    """Counts in which every part weighs something: numbers of the order of FLUX.1."""
    network = dataclasses.replace(
        counts.network,
        parameters=12_000_000_000,
        score=dataclasses.replace(counts.network.score, flops=3e14, flops_32=3e14),
    )
    works = {
        name: dataclasses.replace(getattr(counts.trainer, name), flops=flops, flops_32=flops)
        for name, flops in (("make", 4e13), ("fake", 2e14), ("student", 3e14))
    }
    return dataclasses.replace(
        counts,
        trainer=dataclasses.replace(counts.trainer, **works),
        network=network,
        drawer=network,
        text=text_of(1.0),
    )


def settings(config, *overrides):
    return load(overrides=[f"distill.batch_size={BATCH}", f"teachers.slice={BATCH}", "distill.workers=8", *overrides])


def test_a_step_costs_what_the_schedule_says(config, large):
    gpus = read_gpus()
    timing = schedule(large, settings(config), gpus)
    work = timing.make + timing.updates * timing.fake + timing.student
    assert timing.step == pytest.approx(
        timing.make + max(timing.updates * timing.fake, timing.teacher) + timing.student
    )
    assert timing.sequential == work + timing.teacher
    off = schedule(large, settings(config, "distill.overlap=false"), gpus)
    assert off.step == off.sequential == timing.sequential
    text = schedule(dataclasses.replace(large, text=text_of(1e15)), settings(config), gpus)
    assert text.step == text.text > text.work + text.wait


def test_requests_of_parts_share_the_replicas_up_to_those_in_flight(config, large):
    gpus = read_gpus()

    def timing(*overrides):
        return schedule(large, settings(config, "distill.workers=1", *overrides), gpus)

    one = timing().teacher
    assert timing("teachers.replicas=4").teacher == one  # a single request has one replica
    parts = [timing("distill.micro_batches=4", f"teachers.replicas={n}").teacher for n in (1, 2, 4, 8)]
    assert parts == pytest.approx([parts[0], parts[0] / 2, parts[0] / 4, parts[0] / 4])
    held_back = timing("distill.micro_batches=4", "distill.in_flight=2", "teachers.replicas=4").teacher
    assert held_back == pytest.approx(parts[1])


FLOAT16 = ("student.start_timestep=999", "student.autocast=float16", "distill.mixed_precision=true")


@pytest.mark.full
def test_what_runs_in_bfloat16_is_planned_with_its_speed_and_the_rest_with_float32s(config, counts):
    """A student that starts at t = 999 stays float32; one that starts at 625 does not, nor do Bridge and fake score."""
    late, early = (
        changed(load(overrides=[f"student.start_timestep={t}", f"distill.batch_size={BATCH}"]), mixed_precision=True)
        for t in (999, 500)
    )
    student, teacher = open_space(config.student.model), open_space(config.teacher.model)
    mixed, all_low = (count_trainer(c, student, teacher) for c in (late, early))
    assert counts.trainer.make.flops_32 == counts.trainer.make.flops == mixed.make.flops
    assert mixed.fake.flops_32 < 0.02 * mixed.fake.flops + mixed.make.flops
    assert all_low.make.flops_32 < 0.02 * all_low.make.flops < 0.3 * mixed.make.flops_32
    half = changed(load(overrides=[*FLOAT16, f"distill.batch_size={BATCH}"]), mixed_precision=True)
    half = count_trainer(half, student, teacher)  # its last convolution alone is in float32
    for name in ("make", "student"):
        assert getattr(half, name).flops == getattr(mixed, name).flops
        assert getattr(half, name).flops_32 < 0.1 * getattr(mixed, name).flops_32
    gpu = read_gpus()["H100"]
    plain, low, partly = (gpu.seconds(Cost(1e15, 0, high), 0.5) for high in (1e15, 0.0, 5e14))
    assert plain / low == pytest.approx(gpu.bf16_tflops / gpu.fp32_tflops)
    assert partly == pytest.approx((plain + low) / 2)


def test_a_streamed_bridge_is_as_fast_as_the_slower_of_trainers_and_vae_encoders(config, large):
    """256 pictures of 1 TFLOP a step, beside 40 TFLOP of the trainers', all in float32: the VAEs decide, until there are more."""
    gpus, one = read_gpus(), Cost(1e12, 0, 1e12)
    vae = {role: dataclasses.replace(it, batch=1, encode=one) for role, it in large.vae.items()}
    counted = dataclasses.replace(large, vae=vae, bridge=dataclasses.replace(large.bridge, step=Cost(4e13, 0, 4e13)))
    common = [*RENTED, "plan.efficiency=0.5", "bridge.batch_size=256", "bridge.steps=1000", "distill.workers=2"]
    stream = [*common, "bridge.source=stream", "synthesis.images=/pictures", "synthesis.gpus_per_encoder=1"]

    def planned(*overrides):
        told = load(overrides=[*stream, *overrides])
        bridge = bridge_schedule(counted, told, gpus)
        part = next(part for part in phases(counted, told, gpus) if part.name == "Bridge training")
        return told, bridge, part

    told, bridge, part = planned()
    h100, l40s = gpus["H100"], gpus["L40S"]
    assert bridge.trainers == pytest.approx(4e13 / (0.5e12 * h100.fp32_tflops))
    assert bridge.encoders == pytest.approx(
        256 * 2e12 / 2 / (0.5e12 * l40s.float32(tf32=True))
    )  # of both VAEs, on 2 actors
    assert (part.hours, part.bound) == (pytest.approx(1000 * bridge.encoders / 3600), "VAE encoders")
    assert part.gpus == {"H100": 2, "L40S": 2}
    assert [part.name for part in phases(counted, told, gpus)] == [
        "Bridge training",
        "distillation",
    ]  # nothing is stored
    assert f"from {bridge.enough} a worker on" in " ".join(verdict(counted, told, gpus).split())
    enough = planned(f"synthesis.encoders={bridge.enough}")
    assert enough[2].bound == "trainers"
    assert planned(f"synthesis.encoders={bridge.enough - 1}")[2].bound == "VAE encoders"
    assert "wait for pictures" not in verdict(counted, enough[0], gpus)
    text = " ".join(details(counted, told, gpus).split())
    assert f"both VAEs: {256 / bridge.encoders:.3g} pictures a second, on 2 actors of 1 L40S each, beside" in text

    stored = load(
        overrides=[*common, "synthesis.images=/pictures", "synthesis.gpus_per_encoder=1", "synthesis.count=900"]
    )
    assert bridge_schedule(counted, stored, gpus).encoders == 0
    made = phases(counted, stored, gpus)[0]
    assert made.hours * 3600 == pytest.approx(900 * 2e12 / (0.5e12 * l40s.float32(tf32=True)))
    assert f"both VAEs: {900 / 3600 / made.hours:.3g} pictures a second, on 1 actors" in " ".join(
        details(counted, stored, gpus).split()
    )


def test_from_the_named_number_of_replicas_on_trainers_never_wait(config, large):
    gpus = read_gpus()
    needed = schedule(large, settings(config), gpus).replicas_needed
    assert 1 < needed <= 8
    waits = [schedule(large, settings(config, f"teachers.replicas={n}"), gpus).wait for n in range(1, 9)]
    assert [wait > 0 for wait in waits] == [n < needed for n in range(1, 9)]
    assert waits == sorted(waits, reverse=True)


def test_a_request_that_outlasts_the_fake_updates_asks_for_more_shards(config, large):
    gpus = read_gpus()
    slow = dataclasses.replace(
        large, network=dataclasses.replace(large.network, score=dataclasses.replace(large.network.score, flops=1e18))
    )
    assert schedule(slow, settings(config), gpus).replicas_needed is None
    one, two = (request_seconds(slow, config, gpus["H100"], shards) for shards in (1, 2))
    assert one == pytest.approx(two, rel=0.01)  # a batch of one slice: the second rank only repeats
    eight = dataclasses.replace(slow, batch=2 * BATCH)
    assert request_seconds(eight, config, gpus["H100"], 2) < request_seconds(eight, config, gpus["H100"], 1)


def test_more_shards_never_need_more_memory_than_two(config, large):
    sizes = [teacher_bytes(large, config, shards) for shards in SHARDS]
    assert sizes[0] == 4 * large.network.parameters + large.network.score.peak
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[3] < sizes[0] / 3


def test_what_does_not_fit_says_what_would(config, large):
    chosen = settings(config, "plan.teacher_gpu=4090")
    fits = {(fit.role, fit.gpu): fit for fit in memory_module.memory(large, chosen, read_gpus())}
    assert set(fits) == {("teacher rank", "4090"), ("trainer", "H100")}, "the kinds that are asked for"
    rank = fits["teacher rank", "4090"]
    assert not rank.fits
    assert rank.advice == "teachers.shards=4 is enough"
    trainer = fits["trainer", "H100"]
    assert trainer.fits
    heavy = dataclasses.replace(
        large,
        trainer=dataclasses.replace(large.trainer, student=dataclasses.replace(large.trainer.student, peak=200 * GIB)),
    )
    trainer = memory_module._fit_trainer(heavy, settings(config), "H100", 140 * GIB)
    assert not trainer.fits
    # 200 GiB for 4 samples, next to nothing for one
    assert trainer.advice == (
        "distill.micro_batches=2 or distill.batch_size=3 or distill.gradient_checkpointing=true would"
    )
    remedies = trainer_remedies(large, settings(config))
    assert [label for label, _ in remedies] == [
        "distill.gradient_checkpointing", "fake_score.shard", "optimizers on the host",
    ]  # fmt: skip
    taken = settings(config, "distill.gradient_checkpointing=true", "fake_score.shard=true")
    assert trainer_remedies(large, taken) == remedies[-1:], "those that are taken already are no advice"
    sizes = [trainer_bytes(large, large.batch), *(size for _, size in remedies)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-2] - sizes[-1] == large.trainer.weights.optimizers


def test_settings_that_fit_only_together_are_named_together_and_the_fewest(config, large):
    """One sample a part, recomputed, needs 18 GiB; what other workers hold, and moments in 8 bits, take 4 and 3.7 away."""
    weights = dataclasses.replace(large.least.weights, fake_frozen=5 * GIB, fake_block=0)
    cost = Cost(1.0, 18 * GIB)
    least = dataclasses.replace(
        large.least, weights=weights, make=cost, fake=cost, student=cost, gradients={"student": 2.5 * GIB, "fake": 0}
    )
    counts = dataclasses.replace(large, least=least)
    chosen = settings(config, "distill.workers=5")
    both = "distill.micro_batches=4 distill.gradient_checkpointing=true"
    for has, more in (
        (19, ""),
        (14.4, " fake_score.shard=true"),
        (11, " fake_score.shard=true student.optimizer=adamw8bit"),
    ):
        assert memory_module.together(counts, chosen, has * GIB) == both + more
    assert memory_module.together(counts, chosen, 10 * GIB) is None
    taken = settings(config, "distill.workers=5", "distill.micro_batches=4", "fake_score.shard=true")
    assert memory_module.together(counts, taken, 11 * GIB) == (
        "distill.gradient_checkpointing=true student.optimizer=adamw8bit"
    )
    heavy = dataclasses.replace(counts, trainer=dataclasses.replace(large.trainer, student=Cost(1.0, 200 * GIB)))
    heavy = dataclasses.replace(heavy, recomputing=heavy.trainer, small_trainer=heavy.trainer)
    fit = memory_module._fit_trainer(heavy, chosen, "4090", 11 * GIB)
    assert fit.advice == f"{both} fake_score.shard=true student.optimizer=adamw8bit together would"


def test_a_trainer_that_has_room_need_not_recompute_and_the_plan_says_what_that_saves(config, large):
    """In the fewest parts that fit: two of two samples, for four at once would need 80 GiB of 71.6."""
    cost = Cost(2e14, 80 * GIB)
    keeping = dataclasses.replace(large.trainer, make=cost, fake=cost, student=cost)
    small = dataclasses.replace(keeping, make=Cost(0, 0), fake=Cost(0, 20 * GIB), student=Cost(0, 0))
    counts = dataclasses.replace(large, keeping=keeping, small_keeping=small)
    chosen, gpus = settings(config, *RENTED, "distill.gradient_checkpointing=true", "teachers.replicas=8"), read_gpus()
    assert memory_module.keeping_micro_batches(counts, chosen, gpus) == 2
    change = "distill.gradient_checkpointing=false distill.micro_batches=2"
    other = settings(config, *RENTED, *change.split(), "teachers.replicas=8")
    cheaper = dataclasses.replace(counts, trainer=keeping)
    assert dict(map(reversed, savings(counts, chosen, gpus)))[change] == pytest.approx(
        price(phases(cheaper, other, gpus), other, gpus)
    )
    assert memory_module.keeping_micro_batches(large, chosen, gpus) is None, "it keeps them already"


def test_price_is_hours_times_gpus_times_rate(config, large):
    gpus = read_gpus()
    chosen = settings(
        config, "distill.gpus_per_worker=1", "teachers.gpus_per_rank=1", "teachers.replicas=3", "plan.teacher_gpu=L40S"
    )
    parts = phases(large, chosen, gpus)
    distillation = parts[-1]
    assert distillation.gpus == {"H100": 8, "L40S": 3 * chosen.teachers.shards}
    assert distillation.hours == pytest.approx(chosen.distill.steps * schedule(large, chosen, gpus).step / 3600)
    for spot in (True, False):
        rates = {kind: gpu.spot_price if spot else gpu.price for kind, gpu in gpus.items()}
        # 3 replicas of 2 ranks hold 6 GPUs: two nodes of 4, which are not there while the Bridge is trained
        rented = [4 * -(-p.gpus.get("L40S", 0) // 4) * rates["L40S"] for p in parts]
        head = chosen.plan.head_price
        nodes = [p.gpus.get("H100", 0) * rates["H100"] + one + head for p, one in zip(parts, rented, strict=True)]
        expected = sum(p.hours * node for p, node in zip(parts, nodes, strict=True))
        assert price(parts, priced(chosen, spot=spot), gpus) == pytest.approx(expected)


def test_further_kinds_of_gpu_come_from_a_file(tmp_path):
    file = tmp_path / "gpus.yaml"
    file.write_text(
        "B200: {memory_gib: 179, bf16_tflops: 2250, fp32_tflops: 75, link_gbytes: 900, per_node: 8, price: 14, "
        "spot_price: 6}\nH100: {memory_gib: 79.6, bf16_tflops: 989, fp32_tflops: 67, link_gbytes: 450, per_node: 8, "
        "price: 2.5, spot_price: 1.5}\n"
    )
    gpus = read_gpus(str(file))
    assert gpus["B200"].memory_gib == 179
    assert gpus["H100"].price == 2.5
    assert gpus["L40S"] == read_gpus()["L40S"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X: {memory_gib: 1}", "gpus.yaml: X: bf16_tflops: .*required"),
        ("X: {memory: 1}", "gpus.yaml: X"),
        ("- 1", "must map kinds of GPU"),
        ("a: [", "gpus.yaml"),
    ],
)
def test_a_wrong_table_of_gpus_is_named(text, message, tmp_path):
    (tmp_path / "gpus.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_gpus(str(tmp_path / "gpus.yaml"))


# -- the verdict ------------------------------------------------------------------------------------------

RENTED = ["distill.gpus_per_worker=1", "teachers.gpus_per_rank=1", "plan.teacher_gpu=L40S", "bridge.checkpoint=null"]


def said(counts, config, *labels):
    """Label -> text, of a verdict whose every line fits 80 columns."""
    lines = verdict(counts, config, read_gpus()).splitlines()
    assert max(map(len, lines)) <= 80
    found: dict[str, str] = {}
    label = ""
    for line in lines:
        label = line[:10].strip() or label
        found[label] = f"{found.get(label, '')} {line[10:]}".strip()
    assert list(found) == list(labels)
    return found


def test_the_verdict_says_on_what_how_long_and_for_how_much(config, large):
    chosen, gpus = settings(config, *RENTED, "teachers.replicas=3"), read_gpus()
    parts = phases(large, chosen, gpus)
    total, hours = price(parts, chosen, gpus), sum(part.hours for part in parts)
    lines = said(large, chosen, "fits", "watch", "money", "savings", "speeds", "needs", "terms")
    # 3 replicas of 2 ranks: two nodes of 4
    assert lines["fits"].startswith(f"yes, on 8 H100 (trainers); 8 L40S (teachers): {hours:.1f} h")
    assert lines["fits"].endswith(f"${total:,.0f} at spot prices")
    for part in parts:
        alone = price([part], chosen, gpus)
        assert (
            f"{part.name} ${alone:,.0f} ({alone / total:.0%}, {part.hours:,.1f} h, decided by {part.bound})"
            in lines["money"]
        )
    assert lines["needs"] == "nothing more: models and prompts come with the package"
    assert lines["terms"] == "teacher, student base, student start: the project's own licence (--full says more)"
    needed = schedule(large, chosen, gpus).replicas_needed
    assert lines["watch"].startswith("the trainers wait ")
    assert f"teachers.replicas={needed} on they do not" in lines["watch"]


def test_a_step_distilled_teacher_is_said_before_anything_is_rented(config, large):
    distilled = dataclasses.replace(large, network=dataclasses.replace(large.network, own_steps=4))
    told, other = (verdict(one, settings(config, *RENTED), read_gpus()) for one in (distilled, large))
    assert "teacher.model is step-distilled" in told
    assert "step-distilled" not in other


def test_a_run_without_gpus_says_so(config, large):
    fast = dataclasses.replace(large, network=dataclasses.replace(large.network, score=Cost(1.0, 0)))
    lines = said(fast, settings(config), "fits", "money", "needs", "terms")
    assert lines["fits"].startswith("no GPU is asked for; on one H100 the arithmetic takes ")
    assert lines["money"] == "no GPU is rented"


def test_what_does_not_fit_comes_first_with_what_would(config, large):
    lines = said(large, settings(config, *RENTED, "plan.teacher_gpu=4090"), "fits", "watch", "money", "savings", "speeds", "needs", "terms")  # fmt: skip
    assert lines["fits"].startswith("NO. teacher rank: needs ")
    assert (
        "gets 21.6 of a 4090; teachers.shards=4 is enough. All of it fits H100, H200, A100-80, L40S." in lines["fits"]
    )


def test_what_would_save_most_is_what_the_plan_of_that_would_say(config, large):
    gpus, chosen = (
        read_gpus(),
        settings(config, *RENTED, "synthesis.count=2000000", "bridge.pairs=null", "plan.spot=false"),
    )
    now, found = price(phases(large, chosen, gpus), chosen, gpus), savings(large, chosen, gpus)
    costs = [cost for cost, _ in found]
    assert costs == sorted(costs)
    assert costs[-1] < now
    by_change = {change: cost for cost, change in found}
    for change, told in (
        ("synthesis.count=100000 (of 2,000,000)", "synthesis.count=100000"),
        ("bridge.pairs=… (pairs that you have)", "bridge.pairs=/mine"),
        ("synthesis.images=… (pictures that you have)", "synthesis.images=/mine"),
        ("plan.spot=true", "plan.spot=true"),
    ):
        other = settings(config, *RENTED, "synthesis.count=2000000", "bridge.pairs=null", "plan.spot=false", told)
        assert by_change[change] == pytest.approx(price(phases(large, other, gpus), other, gpus))
    alone = (*RENTED, "bridge.pairs=/mine")  # distillation decides the price
    by_change = {change: cost for cost, change in savings(large, settings(config, *alone), gpus)}
    other = settings(config, *alone, "distill.compile=true")
    assert by_change["distill.compile=true"] == pytest.approx(price(phases(large, other, gpus), other, gpus))
    assert "teachers.compile=true" not in by_change, "of an L40S nobody knows what that saves"


def test_a_cheaper_kind_of_gpu_is_named_where_all_of_it_fits(config, large):
    dear = (*RENTED, "plan.trainer_gpu=H200", "plan.teacher_gpu=H200")
    gpus, chosen = read_gpus(), settings(config, *dear)
    by_change = {change: cost for cost, change in savings(large, chosen, gpus)}
    (kind,) = [change for change in by_change if "_gpu=" in change]
    other = settings(config, *dear, kind)
    assert by_change[kind] == pytest.approx(price(phases(large, other, gpus), other, gpus))
    assert by_change[kind] < price(phases(large, chosen, gpus), chosen, gpus)
    assert all(fit.fits for fit in memory_module.memory(large, other, gpus))


@pytest.mark.parametrize("name", ["sd35_medium_sd15", "flux1_dev_sd21_base", "sdxl_sd15"])
def test_files_weights_tokens_and_terms_of_a_real_pair_are_named(name, large):
    config = load(name)
    counts = dataclasses.replace(large, models=count(Wanted("models", config)))
    lines = said(counts, config, *(["fits", "watch", "money", "savings", "speeds", "needs", "terms"]))
    gated = name != "sdxl_sd15"
    assert f"{config.student.unet} (student.unet)" in (needs := lines["needs"]).partition("not on this machine: ")[2]
    assert f"{config.prompts.path} (prompts.path)" in needs
    assert f"{config.teacher.model}{' (gated)' if gated else ''}" in needs.partition("from the hub: ")[2]
    assert "yuvalkirstain/PickScore_v1 (evaluation.metrics)" in needs.partition("from the hub: ")[2]
    assert ("HF_TOKEN" in needs) == gated
    assert "shapes:" not in needs
    for terms in counts.models.terms:
        assert terms.licence in lines["terms"]


def test_details_fit_80_columns_and_show_the_gpus_that_are_asked_for(large):
    for name in ("sd35_medium_sd15", "flux1_dev_sd21_base"):
        config = load(name, [f"distill.micro_batches={large.batch // 4}"])
        text = details(dataclasses.replace(large, models=count(Wanted("models", config))), config, read_gpus())
        assert max(map(len, text.splitlines())) <= 80
        assert "H100" in text
        assert "L40S" in text
        assert "H200" not in text
        assert "4090" not in text
    named = load(overrides=["plan.trainer_gpu=4090"])  # as people type it
    assert named.plan.trainer_gpu == "4090"


def test_kept_counts_are_those_that_were_counted(config, counts):
    for name, it in wanted(config).items():
        value = getattr(counts, name)
        assert kept.TYPES[it.kind].validate_json(kept.TYPES[it.kind].dump_json(value)) == value
