"""The manifests of k8s/: Kubernetes' schemas, what reviewers look for, and that everything they name is there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

import desfs
from desfs.cli.commands import app
from desfs.cli.mount import _parser
from desfs.mount import _LATE
from desfs.settings import (
    SECTIONS,
    AssignmentSettings,
    CatalogSettings,
    MountSettings,
    PackerSettings,
    ProgramSettings,
    SealSettings,
    read_config,
)
from tests.service import manifests
from tests.service.manifests import K8S, OVERLAYS, ROOT, Manifest, NotSupported, containers_of, nested, pod_of

EXAMPLES = sorted((K8S / "examples").glob("*.yaml"))
# The oldest that README.md names, and the newest whose schemas are known here.
VERSIONS = ("1.28", kubernetes_validate.latest_version())
# Not Kubernetes' own: the Prometheus operator's.
OPERATOR = {"ServiceMonitor", "PodMonitor"}
# Whose settings each component reads.
SETTINGS: dict[str, type[ProgramSettings]] = {
    "assignment": AssignmentSettings,
    "packer": PackerSettings,
    "mount": MountSettings,
    "seal": SealSettings,
    "migrate": AssignmentSettings,
}
# What others read in the environment: boto3, Python's tempfile; and what only the manifests' own words name.
OTHERS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "TMPDIR", "STORE", "MOUNTPOINT"}
README = (K8S / "README.md").read_text()
# A kustomization with one patch.
PATCHED = "kind: Kustomization\nresources: [pod.yaml]\npatches: [{target: {kind: Pod, name: a}, path: patch.yaml}]\n"


@pytest.fixture(scope="module", params=OVERLAYS)
def built(request: pytest.FixtureRequest) -> list[Manifest]:
    """What an overlay makes."""
    return manifests.build(K8S / "overlays" / request.param)


@pytest.fixture(scope="module")
def production() -> list[Manifest]:
    return manifests.build(K8S / "overlays/production")


def find(built: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (each for each in built if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pods(built: list[Manifest]) -> dict[str, dict[str, Any]]:
    """The templates of all pods, by their component."""
    templates = filter(None, map(pod_of, built))
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in templates}


def examples() -> list[Manifest]:
    return [each for path in EXAMPLES for each in manifests.load(path)]


# --- schemas and building --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_validates(built: list[Manifest], version: str) -> None:
    """Strictly: a field that the schema does not have is an error."""
    for manifest in [*built, *examples()]:
        if manifest["kind"] not in OPERATOR:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_every_file_is_built_into_something() -> None:
    """A manifest that no kustomization names is applied by nobody."""
    named = {path.resolve() for path in EXAMPLES}
    for path in K8S.rglob("kustomization.yaml"):
        (spec,) = manifests.load(path)
        files = [*spec["resources"], *(each["path"] for each in spec.get("patches", []))]
        files += [name for each in spec.get("configMapGenerator", []) for name in each["files"]]
        named |= {path, *((path.parent / name).resolve() for name in files)}
    assert set(applied()) - named == set()


def applied() -> list[Path]:
    """All files of which manifests are made."""
    folders = ("base", "overlays", "examples")
    return [path for folder in folders for path in (K8S / folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("kustomization.yaml", "commonLabels: {a: b}\n"),
        ("kustomization.yaml", "resources: [again.yaml]\n"),
        ("patch.yaml", "  finalizers: [a]\n"),
        ("patch.yaml", "kind: Pod\n"),
    ],
)
def test_what_the_builder_does_not_know_it_refuses(tmp_path: Path, file: str, change: str) -> None:
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {tolerations: [{key: b}], containers: [{name: c}]}\n"
    (tmp_path / "pod.yaml").write_text(pod)
    (tmp_path / "patch.yaml").write_text("apiVersion: v1\nkind: Pod\nspec: {hostPID: true}\nmetadata:\n  name: a\n")
    (tmp_path / "kustomization.yaml").write_text(PATCHED)
    (manifest,) = manifests.build(tmp_path)
    assert manifest["spec"]["hostPID"]
    with (tmp_path / file).open("a") as opened:
        opened.write(change)
    with pytest.raises(NotSupported):
        manifests.build(tmp_path)


def test_a_list_that_is_merged_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    head = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
    (tmp_path / "pod.yaml").write_text(f"{head}spec: {{tolerations: [{{key: b}}]}}\n")
    (tmp_path / "patch.yaml").write_text(f"{head}spec: {{tolerations: [{{key: c}}]}}\n")
    (tmp_path / "kustomization.yaml").write_text(PATCHED)
    with pytest.raises(NotSupported, match="tolerations"):
        manifests.build(tmp_path)


def test_the_overlays_differ_in_the_catalog_and_in_size(built: list[Manifest], production: list[Manifest]) -> None:
    """All of the base is in both; and whoever needs the catalog has it, from the settings or from a Secret."""
    base = {(each["kind"], each["metadata"]["name"]) for each in manifests.build(K8S / "base")}
    assert base <= {(each["kind"], each["metadata"]["name"]) for each in built}
    settings = tomllib.loads(settings_of(built)["settings.toml"])
    for component in ("assignment", "packer", "seal", "migrate"):
        (container,) = pods(built)[component]["spec"]["containers"]
        refs = {each["name"]: each.get("valueFrom") for each in container["env"]}
        role = {"assignment": "service", "migrate": "owner"}.get(component, component)
        if built == production:
            assert "catalog" not in settings
            assert refs["DESFS_CATALOG"] == {"secretKeyRef": {"name": f"desfs-catalog-{role}", "key": "url"}}
        else:
            assert "DESFS_CATALOG" not in refs
            mounted = {each["mountPath"]: each for each in container["volumeMounts"]}
            assert "readOnly" not in mounted[str(Path(settings["catalog"]).parent)]


# --- what reviewers look for -----------------------------------------------------------------------------------------


def test_images_have_this_version(built: list[Manifest]) -> None:
    """No `latest`, and no tag of another version than the clone's."""
    found = {each["image"] for manifest in [*built, *examples()] for each in nested(manifest) if "image" in each}
    assert found == {f"registry.example/desfs:{desfs.__version__}"}


def test_requests_and_limits(built: list[Manifest]) -> None:
    for manifest in filter(pod_of, [*built, *examples()]):
        template = pod_of(manifest)
        assert template is not None
        for container in containers_of(template["spec"]):
            for kind in ("requests", "limits"):
                found = container["resources"][kind]
                assert {"cpu", "memory"} <= found.keys(), (manifest["metadata"]["name"], kind)
            for what, wanted in container["resources"]["requests"].items():
                assert amount(wanted) <= amount(container["resources"]["limits"][what])


def amount(text: str) -> float:
    """A quantity of Kubernetes: cores or bytes."""
    units = {"": 1.0, "m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}
    match = re.fullmatch(r"(\d+)(m|Mi|Gi|)", text)
    assert match is not None, text
    return int(match[1]) * units[match[2]]


def test_who_is_privileged(built: list[Manifest]) -> None:
    """The mount alone. All others pass the Pod Security Standard "restricted", and cannot write to their image."""
    for template in filter(None, map(pod_of, [*built, *examples()])):
        pod = template["spec"]
        is_mount = template["metadata"]["labels"].get("app.kubernetes.io/component") == "mount"
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"].get("runAsNonRoot") is (None if is_mount else True)
        assert (pod["securityContext"]["runAsUser"] == 0) is is_mount
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in containers_of(pod):
            context = container["securityContext"]
            assert context.pop("readOnlyRootFilesystem") is True
            closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert context == ({"privileged": True} if is_mount else closed)
            context["readOnlyRootFilesystem"] = True


def test_nobody_has_a_token_of_the_api_server_or_variables_of_services(built: list[Manifest]) -> None:
    """Kubernetes would make DESFS_ASSIGNMENT_… of the Service, and such variables are settings."""
    for template in filter(None, map(pod_of, [*built, *examples()])):
        assert template["spec"]["automountServiceAccountToken"] is False
        assert template["spec"]["enableServiceLinks"] is False
    assert all(each["automountServiceAccountToken"] is False for each in built if each["kind"] == "ServiceAccount")


def test_every_daemon_has_its_probes(built: list[Manifest]) -> None:
    """Bounded, and none asks the store: those over HTTP ask the process, that of a mount its event loop."""
    for component in ("assignment", "packer", "mount"):
        (container,) = pods(built)[component]["spec"]["containers"]
        ports = {each["name"] for each in container["ports"]}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[kind]
            if component == "mount":
                assert 'desfs status "$MOUNTPOINT" --json' in probe["exec"]["command"][-1]
                assert probe["timeoutSeconds"] > 5, "desfs status has five seconds for the mount, and its own start"
            else:
                assert probe["httpGet"]["port"] in ports
                assert probe["httpGet"]["path"] in ("/healthz", "/readyz", "/metrics")
                assert probe["httpGet"]["path"] != "/readyz" or kind == "readinessProbe"
            assert probe["periodSeconds"] * probe["failureThreshold"] >= 10
        patience_s = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
        assert patience_s >= {"assignment": 60, "packer": 120, "mount": 60}[component]


def test_a_request_that_is_too_old_is_older_than_any_may_become(built: list[Manifest]) -> None:
    """desfs/mount.py: a request takes four deadlines at worst."""
    (container,) = pods(built)["mount"]["spec"]["containers"]
    limit = re.search(r'\["oldest_seconds"\] > (\d+)\)', container["livenessProbe"]["exec"]["command"][-1])
    assert limit is not None
    settings = tomllib.loads(settings_of(built)["settings.toml"])
    deadline_s = settings["mount"].get("deadline", MountSettings.model_fields["deadline"].default)
    assert int(limit[1]) > _LATE * deadline_s
    assert f"older than {limit[1]} seconds" in README


def test_termination(built: list[Manifest]) -> None:
    """The service: the wait of preStop, a request, and five seconds until what is left is cut off. The others as
    systemd has it: systemd/*.service, TimeoutStopSec=."""
    found = {name: each["spec"]["terminationGracePeriodSeconds"] for name, each in pods(built).items()}
    (service,) = pods(built)["assignment"]["spec"]["containers"]
    wait_s = int(service["lifecycle"]["preStop"]["exec"]["command"][1])
    assert found["assignment"] >= wait_s + AssignmentSettings.model_fields["request_timeout"].default + 5
    assert found["packer"] == unit_s("desfs-packer@.service") == 300
    assert found["mount"] == unit_s("desfs-mount@.service") == 30
    for component in ("packer", "mount"):
        (container,) = pods(built)[component]["spec"]["containers"]
        assert "lifecycle" not in container, "SIGTERM has them end in order"


def unit_s(unit: str) -> int:
    match = re.search(r"^TimeoutStopSec=(\d+)(min)?$", (ROOT / "systemd" / unit).read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * (60 if match[2] else 1)


def test_a_mount_reaches_its_node_and_pods_see_the_next_one(built: list[Manifest]) -> None:
    """Bidirectional where it is made, HostToContainer where it is read; both have the folder above the mount. Its pods
    are replaced when somebody deletes them; orphans of the probes have a first process that buries them."""
    mount = find(built, "DaemonSet", "desfs-mount")
    assert mount["spec"]["updateStrategy"] == {"type": "OnDelete"}
    pod = mount["spec"]["template"]["spec"]
    assert pod["shareProcessNamespace"] is True
    (host,) = (each["hostPath"]["path"] for each in pod["volumes"] if each["name"] == "mnt")
    for container in containers_of(pod):
        (mounted,) = (each for each in container["volumeMounts"] if each["name"] == "mnt")
        assert (mounted["mountPropagation"], mounted["mountPath"]) == ("Bidirectional", host)
        (place,) = (each["value"] for each in container["env"] if each["name"] == "MOUNTPOINT")
        assert Path(place).parent == Path(host)
    (consumer,) = manifests.load(K8S / "examples/consumer.yaml")
    template = pod_of(consumer)
    assert template is not None
    assert [each["hostPath"]["path"] for each in template["spec"]["volumes"]] == [host]
    for container in containers_of(template["spec"]):
        (mounted,) = container["volumeMounts"]
        assert (mounted["mountPropagation"], mounted["readOnly"]) == ("HostToContainer", True)
        assert f"{mounted['mountPath']}/{Path(place).name}/" in str(container)


def test_a_spool_outlives_its_packer(built: list[Manifest]) -> None:
    packer = find(built, "StatefulSet", "desfs-packer")["spec"]
    assert packer["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    (claim,) = packer["volumeClaimTemplates"]
    (container,) = packer["template"]["spec"]["containers"]
    (spool,) = (each for each in container["volumeMounts"] if each["name"] == claim["metadata"]["name"])
    assert container["args"][:3] == ["packer", "--spool", spool["mountPath"]]
    (writer,) = manifests.load(K8S / "examples/writer.yaml")
    template = pod_of(writer)
    assert template is not None
    (volume,) = template["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == f"{claim['metadata']['name']}-desfs-packer-0"
    (mounted,) = template["spec"]["containers"][0]["volumeMounts"]
    assert mounted["subPath"] == spool["subPath"]
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        assert template["spec"]["securityContext"][name] == packer["template"]["spec"]["securityContext"][name]


def test_production_spreads_and_keeps_enough_alive(production: list[Manifest]) -> None:
    for kind, component in (("Deployment", "assignment"), ("StatefulSet", "packer")):
        workload = find(production, kind, f"desfs-{component}")
        spread = workload["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert {each["topologyKey"] for each in spread} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        for each in [
            *spread,
            {"labelSelector": find(production, "PodDisruptionBudget", f"desfs-{component}")["spec"]["selector"]},
        ]:
            assert each["labelSelector"] == workload["spec"]["selector"]
    scaler = find(production, "HorizontalPodAutoscaler", "desfs-assignment")["spec"]
    assert scaler["minReplicas"] >= 2
    assert "replicas" not in find(production, "Deployment", "desfs-assignment")["spec"], "it would undo the autoscaler"
    assert find(production, "StatefulSet", "desfs-packer")["spec"]["replicas"] == 3


# --- what is named is there ------------------------------------------------------------------------------------------


def settings_of(built: list[Manifest]) -> dict[str, str]:
    (found,) = (each["data"] for each in built if each["kind"] == "ConfigMap")
    contents: dict[str, str] = found
    return contents


def secrets_of_readme() -> dict[str, set[str]]:
    """The keys of each Secret that README.md makes."""
    found = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*)", README):
        found[name] = set(re.findall(r"--from-literal=(\w+)=", rest))
    return found


def test_references_resolve(built: list[Manifest]) -> None:
    """ConfigMaps, Secrets (README.md says how they are made) and their keys, claims, volumes, service accounts."""
    maps = {each["metadata"]["name"]: set(each["data"]) for each in built if each["kind"] == "ConfigMap"}
    claims = {each["metadata"]["name"] for each in built if each["kind"] == "PersistentVolumeClaim"}
    accounts = {each["metadata"]["name"] for each in built if each["kind"] == "ServiceAccount"}
    secrets = secrets_of_readme()
    for manifest in built:
        for each in nested(manifest):
            for key, there in (("configMapKeyRef", maps), ("secretKeyRef", secrets), ("credentials", secrets)):
                if key in each:
                    assert each[key]["key"] in there[each[key]["name"]]
            if "configMap" in each:
                assert each["configMap"]["name"] in maps
            if "secret" in each:
                assert {item["key"] for item in each["secret"]["items"]} <= secrets[each["secret"]["secretName"]]
            if "persistentVolumeClaim" in each:
                assert each["persistentVolumeClaim"]["claimName"] in claims
        template = pod_of(manifest)
        if template is not None:
            pod = template["spec"]
            assert pod["serviceAccountName"] in accounts
            templates = manifest["spec"].get("volumeClaimTemplates", [])
            volumes = [each["name"] for each in pod["volumes"]] + [each["metadata"]["name"] for each in templates]
            used = [each["name"] for container in containers_of(pod) for each in container["volumeMounts"]]
            assert set(volumes) == set(used)
            assert len(volumes) == len(set(volumes))
            for container in containers_of(pod):
                names = [each["name"] for each in container.get("env", [])]
                assert len(names) == len(set(names))


def test_no_secret_is_in_the_tree() -> None:
    files = [path for path in applied() if path.suffix == ".yaml"]
    assert "Secret" not in {each["kind"] for path in files for each in manifests.load(path)}
    used = {
        name
        for overlay in OVERLAYS
        for manifest in manifests.build(K8S / "overlays" / overlay)
        for each in nested(manifest)
        for name in (each.get("secretKeyRef", {}).get("name"), each.get("secretName"))
        if name
    }
    assert used == secrets_of_readme().keys()


def test_selectors_find_pods(built: list[Manifest]) -> None:
    """Of services, network policies, budgets, monitors and the workloads themselves; ports are named as there."""
    labels = [each["metadata"]["labels"] for each in pods(built).values()]
    ports = {
        port["name"]
        for template in pods(built).values()
        for container in template["spec"]["containers"]
        for port in container.get("ports", [])
    }
    for manifest in built:
        spec = manifest.get("spec", {})
        kind = manifest["kind"]
        selectors = [each["podSelector"] for each in nested(manifest) if "podSelector" in each]
        if kind == "Service":
            selectors.append({"matchLabels": spec["selector"]})
            assert {each["targetPort"] for each in spec["ports"]} <= ports
        elif "selector" in spec:
            selectors.append(spec["selector"])
        for selector in selectors:
            if selector.get("matchLabels") != {"desfs-client": "true"}:  # programs of others
                assert any(selects(selector, each) for each in labels), manifest["metadata"]["name"]
        if kind == "NetworkPolicy":
            named = [each["port"] for each in nested(manifest) if "protocol" in each]
            assert {each for each in named if isinstance(each, str)} <= ports
        if kind in ("Deployment", "StatefulSet", "DaemonSet"):
            assert selects(spec["selector"], spec["template"]["metadata"]["labels"])
            assert sum(selects(spec["selector"], each) for each in labels) == 1


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for each in selector.get("matchExpressions", []):
        if each["operator"] != "In" or labels.get(each["key"]) not in each["values"]:
            return False
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def test_monitors_scrape_what_there_is(production: list[Manifest]) -> None:
    service_monitor = find(production, "ServiceMonitor", "desfs-assignment")
    service = find(production, "Service", "desfs-assignment")
    assert selects(service_monitor["spec"]["selector"], service["metadata"]["labels"])
    (endpoint,) = service_monitor["spec"]["endpoints"]
    assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
    pod_monitor = find(production, "PodMonitor", "desfs-daemons")
    (endpoint,) = pod_monitor["spec"]["podMetricsEndpoints"]
    for component, template in pods(production).items():
        if selects(pod_monitor["spec"]["selector"], template["metadata"]["labels"]):
            (container,) = template["spec"]["containers"]
            (port,) = (each for each in container["ports"] if each["name"] == endpoint["port"])
            (address,) = (each["value"] for each in container["env"] if each["name"] == "DESFS_METRICS")
            assert address == f"0.0.0.0:{port['containerPort']}", component
    allowed = find(production, "NetworkPolicy", "desfs-metrics")["spec"]["podSelector"]
    watched = {name for name, each in pods(production).items() if selects(allowed, each["metadata"]["labels"])}
    assert watched == {"assignment", "packer", "mount"}


def test_what_the_settings_name_is_there(built: list[Manifest]) -> None:
    """Files at which Secrets and volumes are, and the service by its name and port."""
    settings = tomllib.loads(settings_of(built)["settings.toml"])
    files = {
        name: {
            f"{mounted['mountPath']}/{item['path']}"
            for each in template["spec"]["volumes"]
            for mounted in template["spec"]["containers"][0]["volumeMounts"]
            if mounted["name"] == each["name"]
            for item in each.get("secret", {}).get("items", [])
        }
        for name, template in pods(built).items()
    }
    assert settings["assignment"]["token_file"] in files["assignment"]
    assert settings["packer"]["assignment_token_file"] in files["packer"]
    (mount,) = pods(built)["mount"]["spec"]["containers"]
    assert settings["mount"]["cache_dir"] in {each["mountPath"] for each in mount["volumeMounts"]}
    service = find(built, "Service", "desfs-assignment")
    (port,) = service["spec"]["ports"]
    assert settings["packer"]["assignment"] == f"http://{service['metadata']['name']}:{port['port']}"
    (container,) = pods(built)["assignment"]["spec"]["containers"]
    assert settings["assignment"]["listen"] == f"0.0.0.0:{container['ports'][0]['containerPort']}"


# --- flags, variables and settings that the programs have ------------------------------------------------------------


def test_settings_files_are_understood_by_every_program(built: list[Manifest], tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    text = settings_of(built)["settings.toml"]
    path.write_text(text + "".join(f"\n[{name}]\n" for name in SECTIONS if f"[{name}]" not in text))
    for kind in {*SECTIONS.values()}:
        kind.model_validate(
            read_config(str(path), kind) | ({"older_than": "90d"} if "older_than" in kind.model_fields else {})
        )
    # What is commented out is no nonsense either.
    path.write_text(re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE))
    assert read_config(str(path), CatalogSettings)["region"] == "us-east-1"


def test_every_variable_is_one_that_the_program_has(built: list[Manifest]) -> None:
    for component, template in pods(built).items():
        known = {f"DESFS_{name.upper()}" for name in SETTINGS[component].model_fields} | OTHERS
        for container in containers_of(template["spec"]):
            assert {each["name"] for each in container.get("env", [])} <= known, component


def test_every_argument_is_one_that_the_program_has(built: list[Manifest]) -> None:
    for component, template in pods(built).items():
        (container,) = template["spec"]["containers"]
        assert "command" not in container, "the image's entry point"
        env = {each["name"]: "x" for each in container["env"]}
        words = manifests.arguments_of(container, env)
        if component == "mount":
            parsed = _parser().parse_args(words[1:])
            assert (parsed.foreground, parsed.source, parsed.directory) == (True, "x", "x")
        else:
            check_words(words)


@pytest.mark.parametrize(
    "of", [lambda: scripts(manifests.build(K8S / "overlays/one-node")), lambda: [README]], ids=["manifests", "README"]
)
def test_every_command_in_a_script_is_one_that_the_program_has(of: Callable[[], list[str]]) -> None:
    commands = [
        match for text in of() for match in re.findall(r"(?<![\w/-])desfs ((?:status|umount) [^|;`)\n]+)", text)
    ]
    assert commands
    for command in commands:
        check_words([word for word in command.replace('"', "").split() if word])


def scripts(built: list[Manifest]) -> list[str]:
    return [each["command"][-1] for manifest in built for each in nested(manifest) if "command" in each]


def check_words(words: list[str]) -> None:
    """Parse a command line as the program does, without running it; a word that it does not know is an error."""
    command: Any = get_command(app)
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


@pytest.mark.parametrize(
    ("words", "found"),
    [("catalog mend", "mend"), ("seal --store x --shop y", "--shop"), ("seal", "store"), ("status", "place|DIR")],
)
def test_a_word_that_no_program_has_is_found(words: str, found: str) -> None:
    """That the two tests above can fail."""
    with pytest.raises(Exception, match=found):
        check_words(words.split())


def test_the_day_ends_for_the_timer_where_it_does_for_all(built: list[Manifest]) -> None:
    """A day is sealed `seal_grace` after its end: not before, or it would be left to the next night."""
    settings = tomllib.loads(settings_of(built)["settings.toml"])
    seal = find(built, "CronJob", "desfs-seal")["spec"]
    assert seal["timeZone"].removeprefix("Etc/") == settings["timezone"]
    minute, hours, *_ = seal["schedule"].split()
    grace_s = SealSettings.model_fields["seal_grace"].default
    assert all(int(hour) * 3600 + int(minute) * 60 > grace_s for hour in hours.split(","))
    assert all(f"{hour}:{minute}" in README for hour in hours.split(","))


def test_yaml_that_says_a_thing_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    assert yaml.safe_load((tmp_path / "twice.yaml").read_text()) == {"a": 2}
    with pytest.raises(NotSupported, match="twice"):
        manifests.load(tmp_path / "twice.yaml")
