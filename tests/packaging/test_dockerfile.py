"""The image: pinned base, unprivileged user, and packages from the lock file; named by the files of cluster/."""

import shlex
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each step, with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    steps = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (step.partition(" ") for step in steps if step.strip())]


def pip_installs() -> list[list[str]]:
    """Arguments of each `pip install`."""
    commands = [part for name, rest in instructions() if name == "RUN" for part in rest.split("&&")]
    words = [shlex.split(command) for command in commands]
    return [arguments[2:] for arguments in words if arguments[:2] == ["pip", "install"]]


def test_the_base_is_a_cuda_runtime_of_one_version():
    [base] = [rest for name, rest in instructions() if name == "FROM"]
    image, _, tag = base.partition(":")
    version, kind, *_ = tag.split("-")
    assert (image, kind) == ("nvidia/cuda", "runtime")
    assert version.count(".") == 2


def test_every_pip_install_keeps_to_the_lock_file():
    runs = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert runs.count("pip install") == len(pip_installs()) == 2
    for arguments in pip_installs():
        assert arguments[arguments.index("-c") + 1] == "requirements.lock"


def test_both_distributables_are_installed_with_all_extras():
    dependencies, packages = (arguments[3:] for arguments in pip_installs())
    assert packages == ["./kernels", ".[all]"]
    known = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    assert {Requirement(text).name for text in dependencies} <= {Requirement(text).name for text in known} | {"triton"}


def test_the_last_user_is_not_root():
    steps = instructions()
    assert [rest for name, rest in steps if name == "USER"] == ["dash"]
    names = [name for name, _ in steps]
    assert names.index("USER") < names.index("COPY")
    assert all("--chown=dash:dash" in rest for name, rest in steps if name == "COPY")


def test_the_cluster_files_name_the_image():
    job = yaml.safe_load((ROOT / "cluster/kuberay_rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (job["headGroupSpec"], *job["workerGroupSpecs"])]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {f"registry.example.com/dash-dist:{PROJECT['version']}"}
    assert "Dockerfile" in (ROOT / "cluster/README.md").read_text()
    assert f"docker build -t {images.pop()} ." in (ROOT / "Dockerfile").read_text()
