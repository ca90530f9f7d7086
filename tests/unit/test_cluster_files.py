"""cluster.yaml against Ray's own schema and autoscaler; configs/kuberay.yaml against it. No cloud is called."""

from __future__ import annotations

import copy
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, ResourceRequest, ResourceRequestByCount
from ray.core.generated.common_pb2 import LabelSelectorOperator

from raydistill.config.reading import CONFIGS, load
from raydistill.config.schema import Config
from raydistill.planning.gpus import read_gpus
from raydistill.planning.schedule import replicas
from raydistill.teachers import placement

ROOT = CONFIGS.parent
PAIRS = sorted(file.stem for file in CONFIGS.glob("*.yaml") if "extends: [paper" in file.read_text())
RAY = "2.60.0"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


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
    return [(placement.bundles(config.teachers), placement.label_selectors(config.teachers))] * replicas


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
    """Teacher nodes of 4 GPUs for ranks and for encoders, three of which share a GPU; one trainer node."""
    ranks = replicas(config) * config.teachers.shards
    return {"teacher": math.ceil((ranks + math.ceil(config.distill.workers / 3)) / 4), "trainer": 1}


# -- AWS ------------------------------------------------------------------------------------------------


def test_the_file_passes_rays_own_schema_and_validation(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_validation_would_find_a_mistake(cluster):
    cluster["available_node_types"]["teacher"]["max_worker"] = 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(cluster))


def test_only_the_head_is_on_demand_and_nothing_runs_before_it_is_asked_for(cluster):
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert set(types) == {"teacher", "trainer"}
    for role, kind in types.items():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["min_workers"] == 0 < kind["max_workers"]
        assert kind["labels"]["role"] == role
    assert sum(kind["max_workers"] for kind in types.values()) == cluster["max_workers"]
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_token_and_the_mode_reach_every_node(cluster):
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]


def test_every_pod_of_ray_can_read_gated_models(kubernetes):
    cluster = kubernetes["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        variables = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert variables["HF_HOME"]["value"].startswith("/shared/")
        secret = {"name": "huggingface", "key": "token", "optional": True}
        assert variables["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": secret}


def test_storage_is_one_folder_for_all_nodes(cluster):
    assert "-v /mnt/shared:/shared" in cluster["docker"]["run_options"]
    assert "-e HF_HOME=/shared/huggingface" in cluster["docker"]["run_options"]
    assert any(".efs." in command and "/mnt/shared" in command for command in cluster["initialization_commands"])
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
    assert launched["teacher"] <= 3


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


def test_the_plan_of_the_ready_configurations_assumes_these_gpus(cluster):
    plan, types = load(CONFIGS / "paper.yaml").plan, cluster["available_node_types"]
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


def test_both_clusters_offer_the_same_nodes(kubernetes, cluster):
    spec, types = kubernetes["RayJob"]["spec"]["rayClusterSpec"], cluster["available_node_types"]
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
def test_a_run_fits_the_pods_as_well(pair, kubernetes, cluster):
    for group in kubernetes["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"])}
        cluster["available_node_types"][group["groupName"]]["resources"] = resources
    config = load(CONFIGS / f"{pair}.yaml")
    assert scheduled(cluster, *demands(config)) == (nodes_of(config), [])
    assert scheduled(cluster, *synthesis_demands(config)) == ({"teacher": 4}, [])
