"""Figures that a job shows arrive where Prometheus looks."""

import time
import urllib.request

from actors.gauges import show, show_pool


def test_figures_are_on_the_nodes_metrics_port(ray_cluster):
    show({"kl/k1": 0.25})
    show_pool("reward.helpful", [True, False, True], queued=3, replaced=1)
    node = ray_cluster.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        "ray_ctrlrl_kl_k1": 0.25, "ray_ctrlrl_pool_reward_helpful_ready": 2, "ray_ctrlrl_pool_reward_helpful_coming": 1,
        "ray_ctrlrl_pool_reward_helpful_queued": 3, "ray_ctrlrl_pool_reward_helpful_replaced": 1,
    }  # fmt: skip
    end, found = time.monotonic() + 60, {}
    while found != wanted:
        assert time.monotonic() < end, found
        time.sleep(1)
        lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
        found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("ray_ctrlrl_")}
        found = {name: value for name, value in found.items() if name in wanted}
