"""Wheels of both distributables: their contents, and the attention in an environment that holds only one of them."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"dash_kernels": ROOT / "kernels", "dash_dist": ROOT}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """The wheel of each package, built from its source distribution."""
    built = {}
    for package, folder in PACKAGES.items():
        out = tmp_path_factory.mktemp(package)
        # From this environment's setuptools: an isolated build would load it from the network.
        command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(out)]
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        [built[package]] = out.glob("*.whl")
    return built


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_holds_every_module_the_type_marker_and_the_licence(wheels, package):
    sources = PACKAGES[package].glob(f"{package}/**/*.py")
    wanted = {str(path.relative_to(PACKAGES[package])) for path in sources}
    names = set(zipfile.ZipFile(wheels[package]).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    assert code == wanted | {f"{package}/py.typed"}
    assert any(re.fullmatch(r"[^/]+\.dist-info/licenses/LICENSE", name) for name in names)


def test_the_attention_runs_with_the_kernels_alone(wheels, tmp_path):
    """The example of kernels/README.md, with only the wheel and the libraries of this environment on the path."""
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text(), re.DOTALL)
    blocked = ("dash_dist", "megatron", "ray", "deepspeed", "datasets", "transformers", "pydantic", "matplotlib")
    guard = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    check = "import dash_kernels; assert '.whl' in dash_kernels.__file__\n"
    environment = {"PYTHONPATH": str(wheels["dash_kernels"]), "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", guard + check + example]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([1, 256, 8, 32])")
