"""cluster/serve.yaml, checked without a cloud: by Ray Serve's own schema, Kubernetes' own, and Ray's own autoscaler."""

import json
from pathlib import Path

import kubernetes_validate
import yaml
from ray.serve.schema import ServeDeploySchema
from test_manifests import KNOWN, node_types, plan

from ctrlrl.config import load
from jobs.parts.serving import ServeConfig
from jobs.replicas import ReplicaConfig

SERVICE, POLICY = yaml.safe_load_all((Path(__file__).parents[2] / "cluster/serve.yaml").read_text())
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
APPLICATION = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"])).applications[0]


def test_ray_serve_takes_the_application_and_so_does_ctrlrl():
    assert APPLICATION.import_path == "jobs.replicas:build" and [d.name for d in APPLICATION.deployments] == ["ctrlrl"]
    arguments = load(ReplicaConfig, None, settings=APPLICATION.args)
    config = load(ServeConfig, None, list(arguments.overrides))
    deployment = APPLICATION.deployments[0]
    assert deployment.graceful_shutdown_timeout_s > config.limits.grace_s
    assert deployment.max_ongoing_requests <= config.engine.max_concurrent
    assert deployment.autoscaling_config["target_ongoing_requests"] < deployment.max_ongoing_requests
    mounted = CLUSTER["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMounts"]
    paths = {mount["mountPath"] for mount in mounted}
    assert {str(Path(arguments.dials).parent), "/shared"} <= paths and arguments.model.startswith("/shared/")


def test_replicas_fit_the_nodes_one_each_up_to_the_last():
    options, scaling = APPLICATION.deployments[0].ray_actor_options, APPLICATION.deployments[0].autoscaling_config
    bundle = {"CPU": options.num_cpus, "GPU": options.num_gpus, **options.resources}
    config = node_types("serve.yaml", {"metadata": SERVICE["metadata"], "spec": CLUSTER})
    assert plan(config, [], [bundle]) == ({"serving": 1}, 0)
    assert plan(config, [], [bundle] * scaling["max_replicas"]) == ({"serving": scaling["max_replicas"]}, 0)
    assert plan(config, [], [bundle] * (scaling["max_replicas"] + 1))[1] == 1
    assert config["available_node_types"][config["head_node_type"]]["resources"].get("CPU", 0) == 0


def test_kubernetes_accepts_the_pods_which_have_no_more_rights_than_they_need():
    assert set(SERVICE["spec"]) == {"serveConfigV2", "rayClusterConfig"} and set(CLUSTER) <= set(KNOWN["RayCluster"].split())
    assert CLUSTER["authOptions"] == {"mode": "token"} and CLUSTER["headGroupSpec"]["serviceType"] == "ClusterIP"
    sandbox = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for group, kind in ((CLUSTER["headGroupSpec"], "head"), *((group, "worker") for group in CLUSTER["workerGroupSpecs"])):
        assert set(group) <= set(KNOWN[kind].split())
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        spec, container = group["template"]["spec"], group["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"] == container["resources"]["requests"] and container["securityContext"] == sandbox
        assert spec["securityContext"]["runAsNonRoot"] is True and {"name": "serve", "containerPort": 8000} in container["ports"]
        json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        assert kind == "head" or spec["automountServiceAccountToken"] is False


def test_only_the_ingress_and_the_operator_reach_the_servers():
    kubernetes_validate.validate(POLICY, kubernetes_validate.latest_version(), strict=True)
    (rule,) = POLICY["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8000] and POLICY["spec"]["policyTypes"] == ["Ingress"]
    assert all(peer.get("podSelector") or peer["namespaceSelector"].get("matchLabels") for peer in rule["from"])
