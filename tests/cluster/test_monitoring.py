"""The shipped dashboard and alert rules: PromQL that parses, on gauges that jobs really set. tests/jobs/test_ppo.py
compares their names with the columns of a real run."""

import json
import re
from pathlib import Path

import promql_parser
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"


def expressions() -> dict[str, str]:
    """Every PromQL expression: name of its panel or alert -> text, dashboard variables filled in."""
    panels = [p for p in json.loads((CLUSTER / "grafana.json").read_text())["panels"] if p["type"] != "row"]
    found = {f"{p['title']} {t['refId']}": t["expr"].replace("$session", ".*") for p in panels for t in p["targets"]}
    return found | {rule["alert"]: rule["expr"] for group in rules() for rule in group["rules"]}


def rules() -> list[dict]:
    return yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"]


def test_every_expression_is_promql():
    assert len(expressions()) > 40
    for name, text in expressions().items():
        promql_parser.parse(text)  # raises ValueError
        assert "ray_ctrlrl_" in text, name


def test_the_dashboard_is_one_that_grafana_imports():
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    assert dashboard["uid"] == "ctrlrl" and dashboard["title"] and dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables | {"__name__"}
    taken = set()
    for p in panels:
        place = p["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24 and not cells & taken, p["title"]
        taken |= cells
        if p["type"] != "row":
            assert p["datasource"] == {"type": "prometheus", "uid": "${datasource}"} and p["targets"]
            assert len({t["refId"] for t in p["targets"]}) == len(p["targets"])


def test_alert_rules_have_what_prometheus_asks_for():
    names = [rule["alert"] for group in rules() for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for group in rules():
        assert set(group) <= {"name", "interval", "rules"}
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"} and re.fullmatch(r"[a-zA-Z_]\w*", rule["alert"])
            assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
            assert rule["labels"]["severity"] in ("warn", "page") and set(rule["annotations"]) == {"summary", "description"}
