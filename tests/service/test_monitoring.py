"""k8s/monitoring: rules and dashboards, by Prometheus itself, over what running daemons answer."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import servers
from tests.mount.mounting import mount, wait_until
from tests.servers import MountPoint
from tests.service.serving import replica
from tests.service.test_metrics import running_packer

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
RULES = FOLDER / "rules.yml"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
RUNBOOKS = Path(__file__).parents[2] / "docs" / "operations.md"


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, str]]:
    """The rules: name, kind, and all of their text."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [
        {"kind": kind, "name": rule[kind], "text": f"{rule['expr']} {json.dumps(rule.get('annotations', {}))}"}
        for group in groups
        for rule in group["rules"]
        for kind in ("record", "alert")
        if kind in rule
    ]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def names_in(text: str) -> set[str]:
    """The series of the daemons that a PromQL expression asks for."""
    return set(re.findall(r"\b(?:desfs|process)_[a-z0-9_]+\b", re.sub(r'"[^"]*"', "", text)))


def test_the_rules_are_sound_and_fire_when_they_should() -> None:
    assert "SUCCESS" in promtool("check", "rules", "rules.yml")
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_a_case_that_fires_one_that_does_not_and_a_runbook() -> None:
    cases = (FOLDER / "rules_test.yml").read_text()
    headings = {
        "-".join(re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).split())
        for line in RUNBOOKS.read_text().splitlines()
        if line.startswith("#")
    }
    alerts = [rule for rule in rules() if rule["kind"] == "alert"]
    assert len(alerts) >= 6
    for alert in alerts:
        fires, quiet = (
            len(re.findall(rf"alertname: {alert['name']}\n{after}", cases))
            for after in (r"        exp_alerts:", r"(?!        exp_alerts:)")
        )
        assert fires >= 1, alert["name"]
        assert quiet >= 1, alert["name"]
        anchor = re.search(r'"docs/operations\.md#([^"]+)"', alert["text"])
        assert anchor is not None, alert["name"]
        assert anchor[1] in headings, alert["name"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_laid_out_and_asks_for_what_it_names(path: Path) -> None:
    """As Grafana takes it: places do not overlap, and every variable in an expression is one of the dashboard's."""
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"desfs-{path.stem}"
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    known = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    for expression in expressions(dashboard):
        assert set(re.findall(r"\$(\w+)", expression)) <= known, expression


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[str]:
    """A Prometheus that asks each job's address once a second, with our rules; its own address."""
    folder.mkdir()
    (port,) = servers.free_ports(1)
    jobs = [{"job_name": name, "static_configs": [{"targets": [address]}]} for name, address in targets.items()]
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # which is YAML as well
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={servers.HOST}:{port}",
    ]
    with servers.child_process(command, log=folder / "log"):
        yield f"{servers.HOST}:{port}"


def ask(address: str, path: str, **query: str) -> Any:
    """The answer of Prometheus' HTTP API."""
    with urllib.request.urlopen(
        f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=20
    ) as answer:
        return json.load(answer)["data"]


def targets_up(address: str) -> set[str]:
    try:
        found = ask(address, "targets")["activeTargets"]
    except OSError:
        return set()
    return {each["labels"]["job"] for each in found if each["health"] == "up"}


def test_every_series_of_rules_and_dashboards_is_scraped(tmp_path: Path, mount_dir: MountPoint) -> None:
    """A mount, a packer and the service, on embedded defaults; all that anybody asks for is there, and makes sense to
    Prometheus."""
    spool, store = tmp_path / "spool", tmp_path / "store"
    spool.mkdir()
    (spool / "f").write_bytes(b"content")
    mount_port, packer_port = servers.free_ports(2)
    addresses = {"desfs-mount": f"{servers.HOST}:{mount_port}", "desfs-packer": f"{servers.HOST}:{packer_port}"}
    options = ("--metrics", addresses["desfs-packer"], "--settle", "0", "--max-age", "0", "--scan-interval", "0.1")
    with (
        replica(str(tmp_path / "service.sqlite"), tmp_path / "service", "--open-metrics") as service,
        running_packer(spool, str(store), *options, env={}),
    ):
        addresses["desfs-assignment"] = service.url.removeprefix("http://")
        with service.client() as client:
            assert client.post("/v1/assign", json={"path": "f"}).status_code == 200
        wait_until(lambda: list(store.glob("*/*.des")), "the container")
        mount(
            store,
            mount_dir.path,
            f"metrics={addresses['desfs-mount']},cache_dir={tmp_path / 'cache'},refresh=0.2",
        )
        (found,) = mount_dir.path.glob("????-??-??/f")
        assert found.read_bytes() == b"content"
        with prometheus(tmp_path / "prometheus", addresses) as address:
            wait_until(lambda: targets_up(address) == set(addresses), "the first answers")
            wanted = {name for rule in rules() for name in names_in(rule["text"])}
            asked = [each for path in DASHBOARDS for each in expressions(json.loads(path.read_text()))]
            wanted |= {name for each in asked for name in names_in(each)}
            assert len(wanted) > 40
            wait_until(lambda: wanted <= set(ask(address, "label/__name__/values")), "all series")
            for expression in asked:
                variables = {"$instance": ".*", "$__rate_interval": "5m"}
                variables |= {f"${name}": "1" for name in ("get_price", "put_price", "gigabyte_price")}
                for name, value in variables.items():
                    expression = expression.replace(name, value)
                assert ask(address, "query", query=expression)["resultType"] == "vector"
            recorded = {rule["name"] for rule in rules() if rule["kind"] == "record"}
            (spool / "g").write_bytes(b"more")  # a rate takes something that happens between two looks
            wait_until(lambda: [path.read_bytes() for path in mount_dir.path.glob("????-??-??/g")], "the second file")
            wait_until(lambda: recorded <= set(ask(address, "label/__name__/values")), "what the rules record")
            assert ask(address, "alerts")["alerts"] == []
