"""A node provider for Ray's autoscaler whose nodes are raylets on this machine (Ray's own test provider needs a file that its wheel lacks).

Loaded by the head of an AutoscalingCluster (autoscaling.py), in the head's process.
"""

import copy
import json
import os

os.environ.setdefault("RAY_FAKE_CLUSTER", "1")

from ray._private.node import Node  # noqa: E402
from ray._private.parameter import RayParams  # noqa: E402
from ray.autoscaler import tags  # noqa: E402
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider  # noqa: E402


class LocalProvider(FakeMultiNodeProvider):
    """Nodes come when they are asked for, are removed when idle, and are no longer listed when their raylet has died, as in a cloud."""

    def non_terminated_nodes(self, tag_filters):
        """Ids of the nodes that run."""
        with self.lock:
            for number in [n for n, known in self._nodes.items() if "node" in known and not known["node"].remaining_processes_alive()]:
                self._nodes.pop(number)["node"].kill_all_processes(check_alive=False, allow_graceful=False)
            return super().non_terminated_nodes(tag_filters)

    def terminate_node(self, node_id):
        """End a node; one that has gone already is no error."""
        with self.lock:
            if node_id in self._nodes:
                super().terminate_node(node_id)

    def _create_node_with_resources_and_labels(self, node_config, given_tags, count, resources, labels):
        offered = copy.deepcopy(resources)
        with self.lock:
            number, kind = self._next_hex_node_id(), given_tags[tags.TAG_RAY_USER_NODE_TYPE]
            identity = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": number, "RAY_CLOUD_INSTANCE_ID": number, "RAY_NODE_TYPE_NAME": kind}
            parameters = RayParams(
                min_worker_port=0, max_worker_port=0, dashboard_port=None, dashboard_agent_listen_port=0, node_manager_port=0,
                num_cpus=offered.pop("CPU", 0), num_gpus=offered.pop("GPU", 0), memory=offered.pop("memory", None),
                object_store_memory=offered.pop("object_store_memory", None), resources=offered, labels=labels,
                redis_address=self._gcs_address, gcs_address=self._gcs_address, include_log_monitor=False,
                env_vars={**identity, "RAY_OVERRIDE_RESOURCES": json.dumps(offered)},
            )  # fmt: skip
            node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
            own = {
                tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER, tags.TAG_RAY_USER_NODE_TYPE: kind, tags.TAG_RAY_NODE_NAME: number,
                tags.TAG_RAY_NODE_STATUS: tags.STATUS_UP_TO_DATE,
            }  # fmt: skip
            self._nodes[number] = {"node": node, "tags": {**own, **given_tags}}
