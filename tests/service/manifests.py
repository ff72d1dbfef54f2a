"""What k8s/ makes: kustomize's `build` for the few of its features that are used there, and no others.

kustomize itself is no package that pip installs. So that nothing is taken for built that it would build otherwise,
whatever is not known here is refused. What kustomize 4.5.4 and 5.5.0 build of the base and the overlays is
the same, but for the order in lists that are merged by a key, where it makes no difference.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("one-node", "production")

Manifest = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "configMapGenerator", "patches"}
_CLUSTER_WIDE = {"Namespace"}
# By which key a list in a patch is merged into the one that is there: Kubernetes' API, x-kubernetes-patch-merge-key.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
}
_REPLACED = {"args", "command", "volumeClaimTemplates"}


class NotSupported(Exception):
    """A kustomization has something that is not known here, or that kustomize would refuse."""


def load(path: Path) -> list[Manifest]:
    """All documents of a file. Raises: NotSupported for a key that stands twice in a mapping."""
    return list(yaml.load_all(path.read_text(), _Strict))


class _Strict(yaml.SafeLoader):
    """YAML without keys that stand twice: the last would win, and the other be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise NotSupported(f"{node.start_mark}: a key stands twice among {keys}")
        return super().construct_mapping(node, deep)


def build(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization, those of its base included. Raises: NotSupported."""
    (spec,) = load(folder / "kustomization.yaml")
    if unknown := spec.keys() - _KNOWN:
        raise NotSupported(f"{folder}: {sorted(unknown)}")
    built = [manifest for name in spec["resources"] for manifest in _resource(folder / name)]
    generated = [_config_map(folder, each) for each in spec.get("configMapGenerator", [])]
    for patch in spec.get("patches", []):
        _patch(built, folder, patch)
    renamed = {each["metadata"]["name"]: f"{each['metadata']['name']}-{_hash(each)}" for each in generated}
    for manifest in generated:
        manifest["metadata"]["name"] = renamed[manifest["metadata"]["name"]]
    built += generated
    for manifest in built:
        if manifest["kind"] not in _CLUSTER_WIDE and "namespace" in spec:
            manifest["metadata"]["namespace"] = spec["namespace"]
        for holder in nested(manifest):
            _refer(holder, renamed)
            for image in spec.get("images", []):
                if holder.get("image") == image["name"]:
                    holder["image"] = f"{image['newName']}:{image['newTag']}"
    identities = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in built]
    if len(identities) != len(set(identities)):
        raise NotSupported(f"{folder}: the same object twice among {identities}")
    return built


def nested(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a manifest, itself too."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nested(each)


def _resource(path: Path) -> list[Manifest]:
    return copy.deepcopy(build(path.resolve()) if path.is_dir() else load(path))  # YAML's aliases are one object


def _config_map(folder: Path, spec: dict[str, Any]) -> Manifest:
    if unknown := spec.keys() - {"name", "files", "literals"}:
        raise NotSupported(f"{folder}: configMapGenerator: {sorted(unknown)}")
    data = {name: (folder / name).read_text() for name in spec.get("files", [])}
    data |= dict(literal.split("=", 1) for literal in spec.get("literals", []))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": spec["name"]}, "data": data}


def _hash(config_map: Manifest) -> str:
    """What kustomize appends to a name, so that pods are made anew when the contents change ."""
    what = {"data": config_map["data"], "kind": "ConfigMap", "name": ""}  # no name: seen with kustomize 4.5.4 and 5.5.0
    text = json.dumps(what, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    for mark in "<>&":  # as Go's json has them
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return digest.translate(str.maketrans("013ae", "ghkmt"))


def _refer(holder: dict[str, Any], renamed: dict[str, str]) -> None:
    """Give references to ConfigMaps their new names."""
    for key in ("configMap", "configMapKeyRef", "configMapRef"):
        if isinstance(found := holder.get(key), dict) and found.get("name") in renamed:
            found["name"] = renamed[found["name"]]


def _patch(built: list[Manifest], folder: Path, spec: dict[str, Any]) -> None:
    if spec.keys() != {"target", "path"} or spec["target"].keys() != {"kind", "name"}:
        raise NotSupported(f"{folder}: patches: want target (kind, name) and path, found {spec}")
    (patch,) = load(folder / spec["path"])
    kind, name = spec["target"]["kind"], spec["target"]["name"]
    targets = [
        each for each in built if re.fullmatch(kind, each["kind"]) and re.fullmatch(name, each["metadata"]["name"])
    ]
    if not targets:
        raise NotSupported(f"{folder}: {spec['path']} is for nothing that is there")
    change = {key: value for key, value in patch.items() if key not in ("apiVersion", "kind", "metadata")}
    if patch["metadata"].keys() != {"name"}:
        raise NotSupported(f"{folder}: {spec['path']}: metadata")
    for target in targets:
        _merge(target, copy.deepcopy(change), spec["path"])


def _merge(target: dict[str, Any], change: dict[str, Any], where: str) -> None:
    for key, value in change.items():
        there = target.get(key)
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value, f"{where}.{key}")
        elif isinstance(value, list) and isinstance(there, list) and key in _MERGE_KEYS:
            by = _MERGE_KEYS[key]
            for each in value:
                same = [one for one in there if one[by] == each[by]]
                if same:
                    _merge(same[0], each, f"{where}.{key}")
                else:
                    there.append(each)
        elif isinstance(value, list) and isinstance(there, list) and key not in _REPLACED:
            raise NotSupported(f"{where}.{key}: how kustomize merges this list is not known here")
        else:
            target[key] = value


# --- pods ----------------------------------------------------------------------------------------------------------


def pod_of(manifest: Manifest) -> dict[str, Any] | None:
    """The template of a workload's pods: {"metadata", "spec"}; None for what has no pods."""
    spec: dict[str, Any] = manifest.get("spec", {})
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template: dict[str, Any] | None = spec.get("template")
    return template


def containers_of(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The containers of a pod's spec, those that run first included."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def environ_of(
    container: dict[str, Any], manifests: list[Manifest], secrets: dict[str, dict[str, str]]
) -> dict[str, str]:
    """The variables of a container, with values from the ConfigMaps among the manifests and from `secrets`."""
    maps = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "ConfigMap"}
    found = {}
    for each in container.get("env", []):
        if "value" in each:
            found[each["name"]] = each["value"]
            continue
        ((kind, ref),) = each["valueFrom"].items()
        found[each["name"]] = {"configMapKeyRef": maps, "secretKeyRef": secrets}[kind][ref["name"]][ref["key"]]
    return found


def arguments_of(container: dict[str, Any], environ: dict[str, str]) -> list[str]:
    """The arguments of a container, with `$(NAME)` as the kubelet puts variables in. Raises: KeyError."""
    return [re.sub(r"\$\((\w+)\)", lambda match: environ[match[1]], word) for word in container.get("args", [])]
