"""The container image: k8s/image/Dockerfile, step by step in a clean directory, and the three roles from its layout.

No container engine is asked. Each stage is a directory: what the Dockerfile copies and runs is copied and run there,
under chroot, with the machine's /usr, read-only, and the interpreter of the tests in place of the base image. What
apt-get would install has to be installed on the machine. The dependencies are borrowed, as in test_install.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import desfs
from tests import servers
from tests.mount.mounting import PATIENCE_S, wait_until
from tests.service import manifests
from tests.service.manifests import K8S, ROOT, Manifest

DOCKERFILE = K8S / "image/Dockerfile"
BUILD_S = 100.0
# Where a stage finds what it borrows.
PACKAGES = "/srv/packages"
SECRETS = {
    "desfs-tokens": {"tokens": "old-t0ken\nt0ken-of-the-image\n", "token": "t0ken-of-the-image"},
    "desfs-s3-packer": {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"},
    "desfs-s3-seal": {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"},
    "desfs-s3-read": {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"},
}

# A mount namespace in which a stage ($1) is a root: with the machine's system, and the interpreter ($2) where the base
# image has it. The words after $3 are folders to bind, source and target in turn; with $3 the root is read-only.
_ENTER = f"""\
set -e
{servers.DROP_COPIED_MOUNTS}
root=$1 python=$2 closed=$3; shift 3
mount --bind "$root" "$root"
for each in bin lib lib32 lib64 libx32 sbin usr dev proc sys; do
    test ! -d "/$each" -o -L "/$each" || mount --rbind "/$each" "$root/$each"
done
mount -o remount,bind,ro "$root/usr"
test "$python" = /usr || mount --bind "$python" "$root/usr/local"
while test $# -gt 0; do mount --bind "$1" "$root$2"; shift 2; done
test -z "$closed" || mount -o remount,bind,ro "$root"
"""

# A request of the kubelet's, and again until it succeeds or the time is over.
_GET = """
import sys, time, urllib.request
deadline = time.monotonic() + float(sys.argv[2])
while True:
    try:
        urllib.request.urlopen(sys.argv[1], timeout=5)
        break
    except OSError:
        if time.monotonic() >= deadline:
            raise
        time.sleep(0.02)
"""


# --- the Dockerfile ------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A stage of the Dockerfile: its steps, each a word and the rest of its line."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, word: str) -> str:
        """The rest of the last line that begins with a word."""
        return [text for each, text in self.steps if each == word][-1]


def read_dockerfile() -> list[Stage]:
    text = "".join(line for line in DOCKERFILE.read_text().splitlines(True) if not line.lstrip().startswith("#"))
    stages: list[Stage] = []
    for line in filter(None, text.replace("\\\n", " ").split("\n")):
        word, rest = line.split(None, 1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].steps.append((word, rest.strip()))
    return stages


def is_sent(path: str) -> bool:
    """Whether a file of the clone is in the build's context: the last line that matches it, or a folder above it,
    decides (Dockerfile.dockerignore)."""
    sent = True
    for line in (K8S / "image/Dockerfile.dockerignore").read_text().splitlines():
        pattern, wanted = line.removeprefix("!"), line.startswith("!")
        if not line or line.startswith("#"):
            continue
        parents = [path, *map(str, Path(path).parents)][:-1]
        if any(fnmatch(each, pattern) or fnmatch(f"/{each}", pattern.replace("**/", "*/")) for each in parents):
            sent = wanted
    return sent


def environ_of(stage: Stage) -> dict[str, str]:
    return dict(word.split("=", 1) for step, text in stage.steps if step == "ENV" for word in shlex.split(text))


# --- its steps -----------------------------------------------------------------------------------------------------


def prepare(root: Path) -> Path:
    """A root that has what the base image has, but for what is bound into it."""
    for each in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
        if Path("/", each).is_symlink():
            (root / each).parent.mkdir(parents=True, exist_ok=True)
            (root / each).symlink_to(os.readlink(f"/{each}"))
        else:
            (root / each).mkdir(parents=True)
    for each in ("usr", "dev", "proc", "sys", "run", "root", "srv/packages", "var/tmp", "opt"):
        (root / each).mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copytree("/etc", root / "etc", symlinks=True)
    return root


def entered(root: Path, *bound: object, closed: bool = False) -> list[str]:
    """The words that set up the namespace; a shell's script follows them, with the root as $0."""
    return [str(root), os.path.realpath(sys.base_prefix), "closed" if closed else "", *map(str, bound)]


def run_step(root: Path, command: str, env: dict[str, str], folder: str) -> None:
    """A RUN step, as root."""
    if packages := re.search(r"apt-get install [^&]*", command):
        wanted = [word for word in packages[0].split()[2:] if not word.startswith("-")]
        shown = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status} ", *wanted], capture_output=True, text=True, check=True
        )
        assert set(shown.stdout.split()) == {"installed"}, (wanted, shown.stdout)
        return
    script = f'{_ENTER}exec chroot "$root" sh -ec \'cd "$0"; eval "$1"\' "$folder" "$step"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *entered(root)],
        env=env | {"folder": folder, "step": command},
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
        stdin=subprocess.DEVNULL,
        umask=0o022,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def copy_step(words: list[str], roots: dict[str, Path], root: Path, folder: str) -> None:
    """A COPY step, from the clone or from an earlier stage."""
    *sources, target = [word for word in words if not word.startswith("--")]
    place = root / os.path.normpath(f"{folder}/{target}").lstrip("/")
    for option in (word for word in words if word.startswith("--")):
        assert option.startswith("--from="), option
        shutil.copytree(roots[option.removeprefix("--from=")] / sources[0].lstrip("/"), place, symlinks=True)
        return
    for source in sources:
        path = ROOT / source
        files = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
        sent = [each for each in files if is_sent(str(each.relative_to(ROOT)))]
        assert sent, f"COPY {source}: nothing of it is sent to the build"
        for each in sent:
            copied = place / (each.name if path.is_file() else each.relative_to(path))
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(each, copied)


def build(stages: list[Stage], folder: Path) -> Path:
    """All stages; the root of the last one."""
    roots: dict[str, Path] = {}
    # No dependencies, and the options that pip has on this machine.
    pip = {name: value for name, value in os.environ.items() if re.match("PIP_|.*_proxy$", name, re.IGNORECASE)}
    for number, stage in enumerate(stages):
        root = prepare(folder / f"stage-{number}")
        env = pip | {"PIP_NO_DEPS": "1", "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"} | python_environ()
        where = "/"
        for word, text in stage.steps:
            match word:
                case "RUN":
                    run_step(root, text, env, where)
                case "COPY":
                    copy_step(text.split(), roots, root, where)
                case "WORKDIR":
                    where = text
                    (root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
                case _:
                    assert word in ("LABEL", "ENV", "USER", "ENTRYPOINT", "CMD"), word
        roots[stage.name] = root
        (root / "etc/hosts").write_text("127.0.0.1 localhost desfs-assignment\n")
    return root


def python_environ() -> dict[str, str]:
    """What an interpreter needs that is not where it was built."""
    return {"LD_LIBRARY_PATH": "/usr/local/lib", "LC_ALL": "C.UTF-8"}


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return read_dockerfile()


@pytest.fixture(scope="module")
def image(stages: list[Stage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the image, able to import what it depends on. Its folder is open to all, as that of an image is."""
    folder = tmp_path_factory.mktemp("image")
    root = build(stages, folder)
    (packages,) = root.glob("opt/desfs/lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(f"{PACKAGES}\n")
    return root


# --- a node, on which containers run -----------------------------------------------------------------------------


@dataclass
class Node:
    """A mount and a network namespace in which the image is a root; closed, as readOnlyRootFilesystem has it."""

    root: Path
    folder: Path
    stage: Stage
    pid: int
    manifests: list[Manifest]

    def command(self, words: list[str], env: dict[str, str], user: str) -> list[str]:
        """What runs a program in the image."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--"]
        variables = environ_of(self.stage) | python_environ() | env
        given = [f"{name}={value}" for name, value in variables.items()]
        return [*enter, "chroot", f"--userspec={user}", str(self.root), "env", "-i", *given, *words]

    def started(self, container: dict[str, Any], pod: dict[str, Any], *more: str) -> list[str]:
        """What starts a container as the kubelet would."""
        env = self.environ(container)
        words = container.get("command") or [
            *shlex.split(re.sub(r'[\[\],"]', " ", self.stage.last("ENTRYPOINT"))),
            *manifests.arguments_of(container, env),
        ]
        return self.command([*words, *more], env, user_of(pod))

    def environ(self, container: dict[str, Any]) -> dict[str, str]:
        found = manifests.environ_of(container, self.manifests, SECRETS)
        mark = {servers.RUN_VARIABLE: os.environ[servers.RUN_VARIABLE], "HOME": "/"}
        return mark | found | ({"STORE": "file:///srv/store"} if "STORE" in found else {})

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_S, check=False, stdin=subprocess.DEVNULL
        )

    def probe(self, container: dict[str, Any], pod: dict[str, Any], kind: str, *, wait: bool = False) -> bool:
        """Whether a probe of a container succeeds; with `wait`, in the end."""
        probe = container[f"{kind}Probe"]
        if "exec" in probe:
            words = probe["exec"]["command"]
        else:
            ports = {each["name"]: each["containerPort"] for each in container["ports"]}
            url = f"http://127.0.0.1:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
            words = ["python3", "-c", _GET, url, str(PATIENCE_S if wait else 0)]
        command = self.command(words, self.environ(container), user_of(pod))
        if wait and "exec" in probe:
            wait_until(lambda: self.run(command).returncode == 0, f"the {kind} probe")
            return True
        return self.run(command).returncode == 0

    def mounts(self) -> str:
        return Path(f"/proc/{self.pid}/mountinfo").read_text()


def user_of(pod: dict[str, Any]) -> str:
    context = pod["securityContext"]
    return f"{context['runAsUser']}:{context['runAsGroup']}"


def workload(built: list[Manifest], kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec of a workload's pods, and its container."""
    (found,) = (each for each in built if (each["kind"], each["metadata"]["name"]) == (kind, name))
    template = manifests.pod_of(found)
    assert template is not None
    (container,) = template["spec"]["containers"]
    return template["spec"], container


def volumes_of(built: list[Manifest], folder: Path) -> dict[str, Path]:
    """A folder for each place at which a container of the manifests has a volume, with what is in it."""
    places: dict[str, Path] = {}
    maps = {each["metadata"]["name"]: each["data"] for each in built if each["kind"] == "ConfigMap"}
    for manifest in built:
        template = manifests.pod_of(manifest)
        if template is None:
            continue
        pod = template["spec"]
        sources = {each["name"]: each for each in pod["volumes"]}
        for container in manifests.containers_of(pod):
            for mounted in container["volumeMounts"]:
                place = mounted["mountPath"]
                path = places.setdefault(place, folder / place.replace("/", "_"))
                path.mkdir(exist_ok=True)
                source = sources.get(mounted["name"], {})  # a claim's template is in no list
                if "configMap" in source:
                    for name, text in maps[source["configMap"]["name"]].items():
                        (path / name).write_text(text)
                elif "secret" in source:
                    for item in source["secret"]["items"]:
                        text = SECRETS[source["secret"]["secretName"]][item["key"]]
                        (path / item["path"]).write_text(text)
                        (path / item["path"]).chmod(source["secret"]["defaultMode"])
                        os.chown(path / item["path"], 0, pod["securityContext"]["fsGroup"])
                elif "hostPath" not in source:
                    os.chown(path, 0, pod["securityContext"].get("fsGroup", 0))
                    path.chmod(0o1777 if place == "/tmp" else 0o2775)
    return places


@pytest.fixture
def node(image: Path, stages: list[Stage], tmp_path: Path) -> Iterator[Node]:
    """The overlay of one node, over a store in a directory."""
    built = manifests.build(K8S / "overlays/one-node")
    (tmp_path / "volumes").mkdir()
    places = volumes_of(built, tmp_path / "volumes")
    places["/srv/store"] = tmp_path / "store"
    places["/srv/store"].mkdir(mode=0o777)
    places["/srv/store"].chmod(0o777)
    for place in places:
        (image / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    bound = [word for place, path in sorted(places.items()) for word in (path, place)]
    script = f"{_ENTER}exec 3>&1\necho entered >&3\nexec sleep infinity"
    argv = ["unshare", "--mount", "--net", "sh", "-c", script, "sh"]
    argv += entered(image, sysconfig.get_path("purelib"), PACKAGES, *bound, closed=True)
    log = tmp_path / "node.log"
    with servers.child_process(argv, log=log, stop_s=0) as process:
        wait_until(lambda: process.poll() is not None or "entered" in log.read_text(), "the namespaces")
        assert process.poll() is None, log.read_text()
        up = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 1))"
        subprocess.run(["nsenter", "--target", str(process.pid), "--net", sys.executable, "-c", up], check=True)
        yield Node(image, tmp_path, stages[-1], process.pid, built)


@contextlib.contextmanager
def running(node: Node, container: dict[str, Any], pod: dict[str, Any], name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A container that runs; it ends as the kubelet has it, by SIGTERM, and has to end well."""
    log = node.folder / f"{name}.log"
    grace_s = float(pod["terminationGracePeriodSeconds"])
    with servers.child_process(node.started(container, pod), log=log, stop_s=grace_s) as process:
        try:
            assert node.probe(container, pod, "startup", wait=True)
            yield process
        except BaseException:
            print(log.read_text())
            raise
    assert process.returncode in (0, -signal.SIGKILL), log.read_text()


# --- tests -----------------------------------------------------------------------------------------------------------


def test_bases_are_pinned_and_the_last_stage_has_no_compiler(stages: list[Stage]) -> None:
    assert [stage.base for stage in stages] == ["python:3.11-slim-bookworm"] * 2
    installed = " ".join(text for word, text in stages[-1].steps if word == "RUN")
    assert re.findall(r"install --yes --no-install-recommends ([\w. -]+?) &&", installed) == ["fuse3"]
    assert "rm -rf /var/lib/apt/lists/*" in installed


def test_who_runs_it(stages: list[Stage]) -> None:
    """A user by number, which runAsNonRoot can tell from root; the three roles by one program."""
    assert stages[-1].last("USER") == "10001:10001"
    assert stages[-1].last("ENTRYPOINT") == '["desfs"]'


def test_labels(stages: list[Stage]) -> None:
    labels = dict(word.split("=", 1) for word in shlex.split(stages[-1].last("LABEL")))
    assert labels["org.opencontainers.image.version"] == desfs.__version__
    assert labels["org.opencontainers.image.licenses"] == setup_cfg()["metadata"]["license"]
    assert labels["org.opencontainers.image.base.name"].endswith(f"/{stages[-1].base}")


def setup_cfg() -> ConfigParser:
    parsed = ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def dependencies() -> dict[str, list[Requirement]]:
    """All that desfs[redis] needs, and what each needs itself; by name."""
    found: dict[str, list[Requirement]] = {}
    own = setup_cfg()["options"]["install_requires"] + setup_cfg()["options.extras_require"]["redis"]
    waiting = [("", frozenset[str]())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        for text in (metadata.requires(name) or []) if name else own.split():
            needed = Requirement(text)
            if needed.marker and not any(needed.marker.evaluate({"extra": each}) for each in ("", *extras)):
                continue
            found.setdefault(canonicalize_name(needed.name), []).append(needed)
            following = canonicalize_name(needed.name), frozenset(needed.extras)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def test_every_dependency_is_pinned_to_a_version_that_is_wanted() -> None:
    lines = (K8S / "image/constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    needed = dependencies()
    assert pinned.keys() == needed.keys()
    refused = {
        name: pinned[name] for name, all_of in needed.items() for each in all_of if pinned[name] not in each.specifier
    }
    assert refused == {}


def test_only_what_is_copied_is_sent() -> None:
    sent = {path.split("/")[0] for path in tracked() if is_sent(path)}
    assert sent == {
        *("des_format", "assignment", "desfs"),
        *("setup.cfg", "pyproject.toml", "setup.py", "README.md", "LICENSE", "k8s"),
    }
    assert [path for path in tracked() if path.startswith("k8s/") and is_sent(path)] == ["k8s/image/constraints.txt"]
    assert not is_sent("desfs/_levers.cpython-311-x86_64-linux-gnu.so")
    assert not is_sent("desfs/cli/__pycache__/mount.cpython-311.pyc")
    assert not is_sent(".git/config")


def tracked() -> list[str]:
    """The files below the clone's folders that may be in it."""
    folders = ("des_format", "assignment", "desfs", "tests", "k8s", "docs", "systemd")
    below = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    files = [*(path for path in ROOT.iterdir()), *below]
    return [str(path.relative_to(ROOT)) for path in files if path.is_file()]


def test_the_image_has_the_program_and_its_extension_and_no_tools(image: Path, stages: list[Stage]) -> None:
    assert (image / "opt/desfs/bin/desfs").read_text().startswith("#!/opt/desfs/bin/python")
    assert len(list(image.glob("opt/desfs/lib/python*/site-packages/desfs/_levers.*.so"))) == 1
    assert list(image.glob("opt/desfs/lib/python*/site-packages/pip")) == []
    assert len(list(image.glob("opt/desfs/lib/python*/site-packages/desfs/__pycache__/mount.*.pyc"))) == 1
    assert not (image / "src").exists()
    assert "\ndesfs:x:10001:10001:" in (image / "etc/passwd").read_text()
    owners = {path.lstat().st_uid for path in image.glob("opt/desfs/**/*")}
    assert owners == {0}, "who runs it may change it"


@pytest.mark.fuse
@pytest.mark.timeout(240)
def test_the_three_roles_run_as_the_manifests_start_them(node: Node) -> None:
    """Migration, service, packer and mount of the overlay for one node, in the image's layout with a read-only root;
    each probe is asked. A killed mount is dead, its probes say so, and the next pod clears it."""
    migrate, migrating = workload(node.manifests, "Job", "desfs-migrate")
    done = node.run(node.started(migrating, migrate))
    assert (done.returncode, done.stdout) == (0, "the catalog is up to date\n"), done.stderr
    service_pod, service = workload(node.manifests, "Deployment", "desfs-assignment")
    packer_pod, packer = workload(node.manifests, "StatefulSet", "desfs-packer")
    spool = node.folder / "volumes/_var_spool_desfs"
    with running(node, service, service_pod, "service"):
        assert node.probe(service, service_pod, "readiness", wait=True)
        assert node.probe(service, service_pod, "liveness")
        write = ["sh", "-c", "echo hello >/var/spool/desfs/once.txt"]
        node.run(node.command(write, {}, user_of(packer_pod))).check_returncode()
        once = node.run(node.started(packer, packer_pod, "--once"))
        assert (once.returncode, once.stdout.startswith("packed 1 files (6 bytes)")) == (0, True), once.stderr
        with running(node, packer, packer_pod, "packer"):
            assert node.probe(packer, packer_pod, "liveness")
    assert [path.name for path in spool.iterdir()] == [".desfs"]
    sealer, sealing = workload(node.manifests, "CronJob", "desfs-seal")
    done = node.run(node.started(sealing, sealer))
    assert (done.returncode, done.stdout.startswith("looked at 0 days")) == (0, True), done.stderr + done.stdout
    check_mount(node)


def check_mount(node: Node) -> None:
    pod, mount = workload(node.manifests, "DaemonSet", "desfs-mount")
    (clear,) = pod["initContainers"]
    place = node.environ(mount)["MOUNTPOINT"]
    read = node.command(["sh", "-c", f"cat {place}/*/once.txt"], {}, "10001:10001")
    assert node.run(node.started(clear, pod)).returncode == 0, "nothing is mounted"
    with running(node, mount, pod, "mount") as process:
        assert node.run(read).stdout == "hello\n"
        (node.folder / "store").rename(node.folder / "away")
        assert node.probe(mount, pod, "liveness"), "a store that is away ends no mount"
        (node.folder / "away").rename(node.folder / "store")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not node.probe(mount, pod, "liveness")
    assert " - fuse.desfs " in node.mounts()
    cleared = node.run(node.started(clear, pod))
    assert cleared.returncode == 0, cleared.stderr
    assert " - fuse.desfs " not in node.mounts()
    with running(node, mount, pod, "mount") as process:
        assert node.run(read).stdout == "hello\n"
        assert node.probe(mount, pod, "readiness")
        process.send_signal(signal.SIGSTOP)
        assert not node.probe(mount, pod, "liveness"), "a daemon whose event loop stands still"
        process.send_signal(signal.SIGCONT)
    assert " - fuse.desfs " not in node.mounts(), "SIGTERM unmounts"
