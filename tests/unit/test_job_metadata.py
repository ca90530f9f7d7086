"""A submitted job says in Ray's lists which run it is; where Ray keeps its facts otherwise, it says how to."""

from __future__ import annotations

import json

import pytest

from raydistill.driver import job_metadata
from raydistill.driver.job_metadata import KEY, NAMESPACE, describe_job

FACTS = {"job_name": "mine", "run": "/shared/runs/mine", "mlflow": "http://server/#/experiments/1"}
JOB = "raysubmit_x1"


@pytest.fixture
def store(monkeypatch):
    """Ray's key-value store as this process sees it, inside of a submitted job."""
    kept = {}
    monkeypatch.setattr(job_metadata, "_internal_kv_get", lambda key, namespace: kept.get((namespace, key)))
    monkeypatch.setattr(
        job_metadata,
        "_internal_kv_put",
        lambda key, value, overwrite, namespace: kept.__setitem__((namespace, key), value),
    )
    config = {"runtime_env": {}, "metadata": {"job_submission_id": JOB, "job_name": JOB}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    return kept


@pytest.mark.parametrize(("own", "name"), [(None, "mine"), ({}, "mine"), ({"job_name": "typed", "team": "a"}, "typed")])
def test_the_facts_are_added_and_what_was_submitted_stays(store, own, name, capsys):
    place = NAMESPACE, KEY.format(JOB).encode()
    store[place] = json.dumps({"status": "RUNNING", "metadata": own}).encode()
    describe_job(FACTS)
    kept = json.loads(store[place])
    assert kept == {"status": "RUNNING", "metadata": FACTS | (own or {}) | {"job_name": name}}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("found", [None, b"{}", b"\x00protobuf"])
def test_where_ray_keeps_them_otherwise_the_line_to_submit_with_is_said_and_nothing_written(store, found, capsys):
    place = NAMESPACE, KEY.format(JOB).encode()
    if found is not None:
        store[place] = found
    before = dict(store)
    describe_job(FACTS)
    assert store == before
    assert f"ray job submit --metadata-json '{json.dumps(FACTS)}'" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{}", "null", '{"metadata": null}', '{"metadata": {}}'])
def test_a_job_that_was_not_submitted_writes_nothing(store, text, monkeypatch, capsys):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if text:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
    describe_job(FACTS)
    assert store == {}
    assert capsys.readouterr().out == ""
