"""infra/monitoring: what is scraped, shown and alerted on exists, and a real promtool, where it is installed, agrees with every rule."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm.observe.exported import EXPORTED
from llm.train.causes import FREE

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana_dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
OURS = {exported.prometheus_name: exported for exported in EXPORTED.values()}

_STRING = re.compile(r'"[^"]*"')
_NOT_A_METRIC = re.compile(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_NAME = re.compile(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring"}


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads."""
    bare = _NOT_A_METRIC.sub(" ", _STRING.sub("", expression).replace("offset 30m", ""))
    return set(_NAME.findall(bare)) - _WORDS


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


@pytest.fixture(scope="module")
def of_ray() -> set[str]:
    """What Ray itself exports: the metrics of its autoscaler, and those that its own dashboards show."""
    import ray
    from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

    found = {metric.name for metric in AutoscalerPrometheusMetrics("test").registry.collect()}  # pyright: ignore[reportOptionalMemberAccess]
    for path in (Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards").glob("*panels.py"):
        found |= set(re.findall(r"\bray_\w+", path.read_text()))
    assert len(found) > 50
    return found


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not on PATH: install Prometheus (Debian: apt-get install prometheus)")
    return path


def run(*command: str | Path, cwd: Path = MONITORING) -> str:
    """What it printed; fails where it does."""
    ran = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def test_names_are_found_in_an_expression():
    found = metric_names(
        'sum by (run) (rate(a_total{x=~"b|c"}[5m])) / on() (d offset 30m or vector(0)) > bool 1.5e3 and time() - up{j="e f"}'
    )
    assert found == {"a_total", "d", "up"}


def test_every_metric_that_is_shown_or_alerted_on_is_one_that_we_or_ray_export(of_ray):
    for where, expression in expressions():
        names = metric_names(expression)
        assert names, f"{where}: {expression} reads no metric"
        assert names <= OURS.keys() | of_ray | {"up"}, f"{where}: nobody exports {names - OURS.keys() - of_ray}"


def test_every_metric_that_we_export_is_on_the_dashboard():
    shown = set().union(*(metric_names(target["expr"]) for panel in panels() for target in panel["targets"]))
    assert OURS.keys() <= shown, OURS.keys() - shown


def test_our_metrics_are_told_apart_by_labels_that_they_have():
    for where, expression in expressions():
        for name, matchers in re.findall(r"(ray_headrace_\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)\s*[=!]", _STRING.sub("", matchers)))
            assert used <= set(OURS[name].labels), f"{where}: {name} has no label {used}"


def test_what_nobody_is_to_blame_for_is_no_crash():
    (rule,) = [rule for rule in RULES if rule["alert"] == "HeadraceCrashLoop"]
    left_out = set(re.findall(r'cause!~"([^"]*)"', rule["expr"]))
    assert left_out == {"|".join(cause.value for cause in FREE)}


def test_every_rule_says_what_happened_and_what_to_do_and_is_seen_to_fire_and_to_be_silent():
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in RULES:
        assert set(rule["annotations"]) == {"summary", "action"} and rule["labels"]["severity"] in ("page", "ticket")
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]}
        assert fires == {True, False}, f"{rule['alert']} needs a case in alerts_test.yaml where it fires, and one where it does not"


def test_the_dashboard_is_one_that_grafana_lays_out_as_written():
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, f"{panel['title']} lies on another panel or beside the page"
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}" and panel["fieldConfig"]["defaults"]["unit"]
        used = set(re.findall(r"\$(\w+)", " ".join(target["expr"] for target in panel["targets"]))) - {"__rate_interval"}
        assert used <= variables


def test_promtool_accepts_the_configuration_and_every_rule_does_what_its_tests_say(promtool):
    assert "SUCCESS" in run(promtool, "check", "config", "prometheus.yaml")
    run(promtool, "check", "rules", "alerts.yaml")
    run(promtool, "test", "rules", "alerts_test.yaml")


@pytest.mark.parametrize("change", ["never", "always"])
@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_the_tests_of_a_rule_notice_when_it_changes(promtool, tmp_path, alert, change):
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    (rule,) = [rule for group in rules["groups"] for rule in group["rules"] if rule["alert"] == alert]
    bound = "> 1e15" if change == "never" else "> -1e15"
    rule["expr"], changed = re.subn(r"(>|>=|==) [\d.]+\s*$", bound, rule["expr"])
    assert changed == 1
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    ran = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode != 0 and f"alertname: {alert}" in ran.stdout + ran.stderr


def test_promtool_parses_every_expression_of_the_dashboard(promtool, tmp_path):
    shown = [target["expr"].replace("$__rate_interval", "1m") for panel in panels() for target in panel["targets"]]
    rules = [{"record": f"shown:{number}", "expr": expression} for number, expression in enumerate(shown)]
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}))
    assert f"{len(shown)} rules found" in run(promtool, "check", "rules", tmp_path / "shown.yaml")


def test_on_kubernetes_the_metrics_ports_of_ray_pods_and_the_autoscalers_are_scraped(promtool, tmp_path):
    """The relabelling on pods as Kubernetes would list them: Debian's Prometheus is built without its client."""

    def pod(name: str, port: str, is_ray: str = "yes", phase: str = "Running", node_type: str = "worker") -> dict[str, Any]:
        meta = {"label_ray_io_is_ray_node": is_ray, "container_port_name": port, "phase": phase, "name": name, "ip": "10.0.0.9"}
        meta |= {"label_ray_io_cluster": "train", "label_ray_io_group": "gpu", "label_ray_io_node_type": node_type}
        return {"targets": [f"{name}.invalid:8080"], "labels": {f"__meta_kubernetes_pod_{key}": value for key, value in meta.items()}}

    pods = [pod("worker", "metrics"), pod("head", "metrics", node_type="head"), pod("head", "gcs-server", node_type="head")]
    pods += [pod("web", "metrics", is_ray="", node_type=""), pod("gone", "metrics", phase="Failed")]
    config = yaml.safe_load((MONITORING / "prometheus_kubernetes.yaml").read_text())
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": ["headrace"]}}]
        job["static_configs"] = pods
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    run(promtool, "check", "config", tmp_path / "prometheus.yaml")

    def scraped(job: str) -> list[dict[str, str]]:
        told = run(promtool, "check", "service-discovery", "--timeout=2s", tmp_path / "prometheus.yaml", job)
        return [each["labels"] for each in json.loads(told[told.index("[") :]) if each.get("labels")]

    nodes, autoscalers = scraped("ray"), scraped("ray-autoscaler")
    assert sorted(each["instance"] for each in nodes) == ["head.invalid:8080", "worker.invalid:8080"]
    assert {(each["ray_cluster"], each["ray_group"], each["pod"]) for each in nodes} == {
        ("train", "gpu", "worker"),
        ("train", "gpu", "head"),
    }
    assert [(each["instance"], each["job"]) for each in autoscalers] == [("10.0.0.9:44217", "ray")]
