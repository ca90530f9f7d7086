"""cluster.yaml and its GCP variant against Ray's own schema and autoscaler, and what else describes a cluster against them.

No cloud is called. How the Slurm script behaves: test_slurm.py. The Dockerfile's steps: end_to_end/test_dockerfile.py.
"""

from __future__ import annotations

import copy
import math
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, ResourceRequest, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator

from raydistill.config.reading import CONFIGS, load
from raydistill.config.schema import Config
from raydistill.driver.job import RESUMABLE
from raydistill.planning.gpus import read_gpus
from raydistill.planning.schedule import replicas
from raydistill.teachers import placement

ROOT = CONFIGS.parent
PAIRS = sorted(file.stem for file in CONFIGS.glob("*.yaml") if "extends: [paper" in file.read_text())
RAY = "2.60.0"


AWS, GCP = ROOT / "cluster.yaml", CONFIGS / "clusters" / "gcp.yaml"
SKYPILOT, SLURM = CONFIGS / "clusters" / "skypilot.yaml", CONFIGS / "clusters" / "slurm.sbatch"


@pytest.fixture(params=[AWS, GCP], ids=["aws", "gcp"])
def cluster(request) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


@pytest.fixture
def aws() -> dict[str, Any]:
    return yaml.safe_load(AWS.read_text())


@pytest.fixture
def kubernetes() -> dict[str, dict[str, Any]]:
    """Documents by kind."""
    documents = yaml.safe_load_all((CONFIGS / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


Group = tuple[list[dict[str, float]], list[dict[str, str]]]  # bundles, and labels of each
Actors = tuple[int, dict[str, float], dict[str, str]]  # how many, what each reserves, and labels


def request(amounts: dict[str, float], labels: dict[str, str]) -> ResourceRequest:
    equal = LabelSelectorOperator.LABEL_OPERATOR_IN
    selector = [[(key, equal, [value]) for key, value in labels.items()]] if labels else None
    return ResourceRequestUtil.make(amounts, label_selectors=selector)


def scheduled(cluster: dict[str, Any], groups: list[Group], actors: list[Actors]):
    """What Ray's autoscaler would launch for placement groups, and actors outside of them."""
    config = AutoscalingConfig(copy.deepcopy(cluster), skip_content_hash=True)
    gangs = []
    for bundles, labels in groups:
        gang = GangResourceRequest()
        gang.requests.extend(request(bundle, wanted) for bundle, wanted in zip(bundles, labels, strict=True))
        gangs.append(gang)
    alone = [ResourceRequestByCount(request=request(*what), count=count) for count, *what in actors]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            idle_timeout_s=config.get_idle_timeout_s(),
            gang_resource_requests=gangs,
            resource_requests=alone,
        )
    )
    launched = {request.instance_type: request.count for request in reply.to_launch}
    launched.pop(config.get_head_node_type(), None)  # the empty cluster of this test has no head yet
    return launched, reply.infeasible_gang_resource_requests


def teachers(config: Config, replicas: int) -> list[Group]:
    """As the service asks for them."""
    bundles = placement.bundles(config.teachers)
    return [(bundles, placement.label_selectors(config.teachers) or [{}] * len(bundles))] * replicas


def demands(config: Config) -> tuple[list[Group], list[Actors]]:
    """Of a distillation: its teacher replicas, trainers and text encoders."""
    distill, prompts = config.distill, config.prompts
    worker = {"CPU": distill.cpus_per_worker, "GPU": distill.gpus_per_worker}
    trainers = [worker] * distill.workers, [distill.node_labels] * distill.workers
    encoder = {"CPU": prompts.cpus_per_encoder, "GPU": prompts.gpus_per_encoder}
    actors = [(distill.workers * prompts.encoders, encoder, prompts.node_labels)]
    return [*teachers(config, replicas(config)), trainers], actors


def synthesis_demands(config: Config) -> tuple[list[Group], list[Actors]]:
    """Of the pairs' synthesis: as many teacher replicas as it may have, and what asks and encodes."""
    synthesis = config.synthesis
    actor = {"CPU": synthesis.cpus_per_encoder, "GPU": synthesis.gpus_per_encoder}
    return teachers(config, config.teachers.max_replicas), [(2 * synthesis.encoders, actor, synthesis.node_labels)]


def nodes_of(config: Config) -> dict[str, int]:
    """Teacher nodes of 4 GPUs for ranks and for encoders, of which as many share a GPU as have room; one trainer node."""
    ranks, share = replicas(config) * config.teachers.shards, int(1 / config.prompts.gpus_per_encoder)
    # more than that is of no use to another encoder, and Ray's autoscaler would count it as room
    assert config.prompts.gpus_per_encoder == pytest.approx(1 / share, rel=0.02)
    return {"teacher": math.ceil((ranks + math.ceil(config.distill.workers / share)) / 4), "trainer": 1}


# -- AWS and Google Cloud -------------------------------------------------------------------------------


def test_the_file_passes_rays_own_schema_and_validation(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_gpus_that_the_gcp_file_names_are_known_to_the_plan():
    types = yaml.safe_load(GCP.read_text())["available_node_types"]
    assert {types[role]["labels"]["gpu"] for role in ("teacher", "trainer")} <= set(read_gpus())
    assert "plan.teacher_gpu=A100-80" in GCP.read_text()


def test_the_validation_would_find_a_mistake(cluster):
    cluster["available_node_types"]["teacher"]["max_worker"] = 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(cluster))


def is_spot(node: dict[str, Any]) -> bool:
    """Of either cloud."""
    model = node.get("scheduling", {}).get("provisioningModel")
    return model == "SPOT" or node.get("InstanceMarketOptions") == {"MarketType": "spot"}


def test_only_the_head_is_on_demand_and_nothing_runs_before_it_is_asked_for(cluster):
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert not is_spot(head["node_config"])
    assert head["resources"] == {"CPU": 0}
    assert set(types) == {"teacher", "trainer"}
    for role, kind in types.items():
        assert is_spot(kind["node_config"])
        assert kind["min_workers"] == 0 < kind["max_workers"]
        assert kind["labels"]["role"] == role
    assert sum(kind["max_workers"] for kind in types.values()) == cluster["max_workers"]
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_token_and_the_mode_reach_every_node(cluster):
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert {"-e RAY_AUTH_MODE=token", "-e RAY_JOB_STOP_WAIT_TIME_S=120"} <= set(cluster["docker"]["run_options"])


def test_every_pod_of_ray_can_read_gated_models(kubernetes):
    cluster = kubernetes["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        variables = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert variables["HF_HOME"]["value"].startswith("/shared/")
        secret = {"name": "huggingface", "key": "token", "optional": True}
        assert variables["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": secret}


def test_the_head_waits_for_a_checkpoint_when_a_job_is_stopped(kubernetes):
    head = kubernetes["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in head["env"]


def test_storage_is_one_folder_for_all_nodes(cluster):
    assert "-v /mnt/shared:/shared" in cluster["docker"]["run_options"]
    assert "-e HF_HOME=/shared/huggingface" in cluster["docker"]["run_options"]
    assert any("mount -t nfs" in command and "/mnt/shared" in command for command in cluster["initialization_commands"])
    assert load(CONFIGS / "paper.yaml").storage.startswith("/shared/")


def test_image_packages_and_this_installation_are_of_one_ray(cluster, kubernetes):
    assert version("ray") == RAY
    assert cluster["docker"]["image"] == f"rayproject/ray:{RAY}-py311-gpu"
    assert any(f"]=={RAY}" in command for command in cluster["setup_commands"])
    assert kubernetes["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == RAY


@pytest.mark.parametrize("pair", PAIRS)
def test_the_autoscaler_places_a_run_on_the_nodes_meant_for_it(pair, cluster):
    config = load(CONFIGS / f"{pair}.yaml")
    launched, infeasible = scheduled(cluster, *demands(config))
    assert infeasible == []
    assert launched == nodes_of(config)
    assert launched["teacher"] <= cluster["available_node_types"]["teacher"]["max_workers"]


@pytest.mark.parametrize("pair", PAIRS)
def test_synthesis_has_all_teacher_nodes_and_rents_no_trainer(pair, cluster):
    config = load(CONFIGS / f"{pair}.yaml")
    assert replicas(config, config.synthesis.encoders * config.synthesis.in_flight) == config.teachers.max_replicas
    assert scheduled(cluster, *synthesis_demands(config)) == ({"teacher": 4}, [])


def test_more_teachers_start_more_teacher_nodes_up_to_the_limit(cluster):
    fixed = ["teachers.max_replicas=null", "teachers.min_replicas=null"]
    config = load(CONFIGS / "flux1_dev_sd15.yaml", [*fixed, "teachers.replicas=3"])
    assert scheduled(cluster, *demands(config)) == ({"teacher": 4, "trainer": 1}, [])
    config = load(CONFIGS / "flux1_dev_sd15.yaml", [*fixed, "teachers.replicas=5"])
    launched, infeasible = scheduled(cluster, *demands(config))
    assert launched == {"teacher": 4, "trainer": 1}
    assert len(infeasible) == 1


def test_labels_keep_teachers_off_the_trainers_nodes(cluster):
    config = load(CONFIGS / "flux1_dev_sd15.yaml", ["teachers.node_labels={role: nowhere}"])
    launched, infeasible = scheduled(cluster, *demands(config))
    assert launched == {"teacher": 1, "trainer": 1}, "for the text encoders, which may be there"
    assert len(infeasible) == config.teachers.replicas


def test_the_plan_of_the_ready_configurations_assumes_these_gpus(aws):
    plan, types = load(CONFIGS / "paper.yaml").plan, aws["available_node_types"]
    assert (plan.teacher_gpu, plan.trainer_gpu) == tuple(
        types[role]["labels"]["gpu"] for role in ("teacher", "trainer")
    )
    for role in ("teacher", "trainer"):
        assert read_gpus()[types[role]["labels"]["gpu"]].per_node == types[role]["resources"]["GPU"]


# -- Kubernetes -----------------------------------------------------------------------------------------


def test_the_kubernetes_objects_have_their_required_fields(kubernetes):
    assert set(kubernetes) == {"PersistentVolumeClaim", "RayJob"}
    job = kubernetes["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert job["metadata"]["name"]
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        for container in pod["containers"]:
            assert container["name"]
            assert container["image"]
            assert set(container["resources"]["requests"]) == set(container["resources"]["limits"])
            assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert claims == {kubernetes["PersistentVolumeClaim"]["metadata"]["name"]}
    assert kubernetes["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_entrypoint_names_a_job_and_a_configuration_of_this_repository(kubernetes):
    words = kubernetes["RayJob"]["spec"]["entrypoint"].split()
    inside = "/home/ray/raydistill/"
    files = [Path(ROOT, word.removeprefix(inside)) for word in words if word.startswith(inside)]
    assert len(files) == 2
    assert all(file.is_file() for file in files)
    load(files[1], [word for word in words if "=" in word])
    assert any(word.startswith("run.name=") for word in words)  # or a retried job would start anew


def test_both_clusters_offer_the_same_nodes(kubernetes, aws):
    spec, types = kubernetes["RayJob"]["spec"]["rayClusterSpec"], aws["available_node_types"]
    assert spec["headGroupSpec"]["labels"] == types["head"]["labels"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == str(types["head"]["resources"]["CPU"])
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == set(types) - {"head"}
    for name, group in groups.items():
        node, pod = types[name], group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) == node["resources"]["GPU"]
        assert 0.9 * node["resources"]["CPU"] <= int(limits["cpu"]) <= node["resources"]["CPU"]
        assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == node["node_config"]["InstanceType"]
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, node["max_workers"])
        assert group["labels"] == node["labels"]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_fits_the_pods_as_well(pair, kubernetes, aws):
    for group in kubernetes["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])}
        aws["available_node_types"][group["groupName"]]["resources"] = resources
    config = load(CONFIGS / f"{pair}.yaml")
    assert scheduled(aws, *demands(config)) == (nodes_of(config), [])
    assert scheduled(aws, *synthesis_demands(config)) == ({"teacher": 4}, [])


# -- what people type -----------------------------------------------------------------------------------

PAGES = sorted([ROOT / "README.md", *CONFIGS.rglob("*.md"), *(ROOT / "raydistill").rglob("README.md")])
BLOCKS = [block for page in PAGES for block in re.findall(r"```\w*\n([\s\S]*?)```", page.read_text())]
STARTS = [block for block in BLOCKS if re.search(r"^ray (start --head|up) ?", block, re.MULTILINE)]
STARTS += [AWS.read_text().partition("\n\n")[0], GCP.read_text().partition("\n\n")[0], SLURM.read_text()]


@pytest.mark.parametrize("text", STARTS)
def test_the_token_is_made_before_a_cluster_starts_and_a_head_waits_for_checkpoints(text):
    """On a machine without a token, Ray's start ends in a traceback."""
    start = re.search(r"ray (start|up) ", text)
    before = text[: start.start()]
    assert "ray get-auth-token --generate > /dev/null" in before
    if start[1] == "start":
        assert re.search(r"^export .*RAY_AUTH_MODE=token", before, re.MULTILINE)
        assert re.search(r"^export .*RAY_JOB_STOP_WAIT_TIME_S=", before, re.MULTILINE)


def test_all_pages_were_looked_at():
    assert len(STARTS) >= 7


# -- Slurm, SkyPilot, image -----------------------------------------------------------------------------


def configuration(script: str) -> Config:
    """Of the job that a shell script starts; its variables stand for absolute paths."""
    words = shlex.split(script, comments=True)
    words = words[words.index("--config") + 1 :]
    words = words[: words.index("&")] if "&" in words else words
    values = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]  # a variable's default
    overrides = [re.sub(r"\$\{?\w+\}?", "/x", word) for word in values if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    assert len(overrides) > 10
    return load(CONFIGS / f"{Path(words[0]).stem}.yaml", overrides)


@pytest.mark.parametrize(
    "script", [SLURM.read_text(), yaml.safe_load(SKYPILOT.read_text())["run"]], ids=["slurm", "sky"]
)
def test_a_run_fits_the_machines_that_are_asked_for(script, aws):
    config = configuration(script)
    machine = {"resources": {"CPU": 96, "GPU": 8}, "labels": {"role": "all"}, "min_workers": 0, "max_workers": 2}
    if script != SLURM.read_text():
        machine |= {"resources": {"CPU": 64, "GPU": 8}, "labels": {}, "max_workers": 1}
    aws["available_node_types"] = {
        "head": aws["available_node_types"]["head"],
        "machine": machine | {"node_config": {}},
    }
    labels = (config.teachers, config.distill, config.synthesis, config.prompts)
    assert all(section.node_labels == machine["labels"] for section in labels)
    launched, infeasible = scheduled(aws, *demands(config))
    assert infeasible == []
    assert launched == {"machine": machine["max_workers"]}
    groups, actors = synthesis_demands(config.model_copy(update={"teachers": with_replicas(config.teachers)}))
    launched, infeasible = scheduled(aws, groups, actors)
    assert infeasible == []
    assert launched["machine"] <= machine["max_workers"]


def with_replicas(teachers: Any) -> Any:
    return teachers.model_copy(update={"max_replicas": teachers.replicas})


@pytest.mark.parametrize(
    "script",
    [SLURM.read_text(), *(yaml.safe_load(SKYPILOT.read_text())[part] for part in ("setup", "run"))],
)
def test_shell_scripts_can_be_read(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_slurm_signals_the_script_alone_long_before_the_limit():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SLURM.read_text(), re.MULTILINE))
    assert re.fullmatch(r"B:TERM@\d{3,}", options["signal"])
    assert (options["nodes"], options["gpus-per-node"], options["cpus-per-task"]) == ("2", "8", "96")


def test_a_managed_job_goes_on_after_what_the_job_calls_resumable():
    task = yaml.safe_load(SKYPILOT.read_text())
    # of SkyPilot's documentation; its package is no dependency of the tests
    assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [RESUMABLE]
    assert task["resources"]["use_spot"]
    assert set(re.findall(r"\$(\w+)", task["run"])) <= set(task["envs"])
    assert task["envs"]["STORAGE"].startswith("s3://")
    assert "MLFLOW_TRACKING_URI" in task["envs"], "a bucket holds no database"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_one_dockerfile_has_an_image_for_each_device_of_the_same_ray(device, tmp_path):
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text())
    image = DockerfileParser(str(tmp_path), build_args={"DEVICE": device})
    assert image.baseimage == f"rayproject/ray:{RAY}-py311-{device}"
    assert {step["instruction"] for step in image.structure} <= {
        "COMMENT", "ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD",
    }  # fmt: skip
    assert f'"ray=={RAY}"' in image.content
    assert (image.envs["RAY_AUTH_MODE"], image.envs["RAY_JOB_STOP_WAIT_TIME_S"]) == ("token", "120")
