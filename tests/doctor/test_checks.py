"""Each check in a situation that is broken: it fails, and says what to do."""

import errno
import http.server
import importlib.metadata
import itertools
import os
import resource
import shutil
import socket
import stat
import sys
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import yaml

from dash_dist.config.file import load_config
from dash_dist.doctor import Site, Status
from dash_dist.doctor.checks import configuration, host, network, packages, ray_cluster, storage
from tests.doctor.findings import failed
from tests.support.runs import write_config


@pytest.fixture
def site(tmp_path):
    return Site(ranks=2, gpus=0, directory=tmp_path / "runs")


# host


def test_little_shared_memory(site, monkeypatch):
    for mebibytes, status in ((32, Status.FAILURE), (64, Status.WARNING), (2048, Status.OK)):
        monkeypatch.setattr(os, "statvfs", lambda path, n=mebibytes: SimpleNamespace(f_bavail=n, f_frsize=2**20))
        (finding,) = host.shared_memory(site)
        assert finding.status is status
        assert finding.value == mebibytes / 1024
    monkeypatch.setattr(os, "statvfs", lambda path: (_ for _ in ()).throw(OSError(errno.ENOENT, "No such file")))
    failed(host.shared_memory(site), "--shm-size")


def test_few_open_files(site, monkeypatch):
    for limit, status in ((256, Status.FAILURE), (1024, Status.WARNING), (65536, Status.OK), (-1, Status.OK)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, n=limit: (n, n))
        (finding,) = host.open_files(site)
        assert finding.status is status
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    failed(host.open_files(site), "ulimit -n")


def test_a_clock_that_is_set_while_it_is_watched(site, monkeypatch):
    real, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + (3.0 if time.monotonic() > began + 0.1 else 0.0))
    assert failed(host.clock(site), "chrony").value == pytest.approx(3.0, abs=0.1)


def test_a_clock_without_a_time_server(site, monkeypatch):
    for state, status in ((False, Status.WARNING), (None, Status.SKIPPED), (True, Status.OK)):
        monkeypatch.setattr(host, "_synchronised", lambda found=state: found)
        (finding,) = host.clock(site)
        assert finding.status is status


# network


def test_interfaces_that_do_not_exist(site, monkeypatch):
    monkeypatch.setattr(network, "_interfaces_up", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.1", "eth01": "10.0.0.2"})
    for value, used in (("eth", "eth0 (10.0.0.1), eth01"), ("=eth0", "eth0 (10.0.0.1)"), ("^eth", "lo (127.0.0.1)")):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        assert used in network.interfaces(site)[0].text
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=eth")
    assert "eth0, eth01, lo" in failed(network.interfaces(site), "Set NCCL_SOCKET_IFNAME").text
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth")
    failed(network.interfaces(site), "Set GLOO_SOCKET_IFNAME")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    failed(network.interfaces(site), "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME", Status.WARNING)


def test_a_host_without_an_address(site, monkeypatch):
    def unknown(*arguments):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in failed(network.interfaces(site), "/etc/hosts").text


# packages


def test_versions_that_are_not_supported(site, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("ray", "safetensors"):
            raise importlib.metadata.PackageNotFoundError(name)
        return {"megatron-core": "0.20.0", "deepspeed": "0.18.2"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = packages.versions(site)
    findings = {one.name: one for one in found if one.status is Status.FAILURE}
    assert findings.keys() == {"megatron-core", "safetensors", "deepspeed"}
    assert "0.20.0 is installed, supported are <0.20,>=0.16.1" in findings["megatron-core"].text
    assert "pip install 'megatron-core<0.20,>=0.16.1'" in findings["megatron-core"].advice
    assert "not installed" in findings["safetensors"].text
    assert "pip install 'deepspeed<0.20,>=0.19'" in findings["deepspeed"].advice
    (missing,) = [one for one in found if one.status is Status.SKIPPED]
    assert missing.name == "extra ray"
    assert "ray not installed; `pip install 'dash-dist[ray]'`" in missing.text


def test_a_package_that_cannot_be_imported(site, monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "_IMPORTED", ("broken_package", "json"))
    assert "libcudart.so.12" in failed(packages.imports(site), "Install again").text


def test_a_missing_extra_is_no_failure(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(packages, "_IMPORTED", ("ray",))
    (finding,) = packages.imports(site)
    assert finding.status is Status.SKIPPED
    assert "dash-dist[ray]" in finding.text


# storage


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    site = Site(ranks=2, gpus=0, directory=tmp_path / "file" / "runs")
    assert "Not a directory" in failed(storage.speed(site), "Set run.directory").text


def test_storage_that_gives_back_something_else(site, monkeypatch):
    monkeypatch.setattr(storage, "_TRIAL_BYTES", 8 * 2**20)
    assert all(one.status is not Status.FAILURE for one in storage.speed(site))
    checksums = itertools.count()
    monkeypatch.setattr(storage.zlib, "crc32", lambda block: next(checksums))
    assert "2 of 2 blocks came back changed" in failed(storage.speed(site), "repaired").text
    assert not site.directory.exists()


def test_too_little_space_for_the_checkpoints(site, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    failed(storage.space(site), "Free space", Status.WARNING)
    config = load_config(write_config(tmp_path), ["model.hidden_size=256"])
    with_config = Site(ranks=2, gpus=0, directory=tmp_path, config=config)
    assert "the run keeps 2 checkpoints of up to" in failed(storage.space(with_config), "checkpoint.keep").text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**40))
    assert storage.space(with_config)[0].status is Status.OK


# Ray


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_a_cluster_without_a_token_here(site, home):
    (finding,) = ray_cluster.token(site)
    assert finding.status is Status.SKIPPED
    cluster = Site(ranks=2, gpus=0, directory=home, address="http://127.0.0.1:8265")
    assert "No such file" in failed(ray_cluster.token(cluster), "ray get-auth-token --generate").text
    (home / ".ray" / "auth_token").write_text("\n")
    assert "is empty" in failed(ray_cluster.token(cluster), "ray get-auth-token --generate").text


def test_a_token_that_others_may_read(site, home, monkeypatch):
    token = home / ".ray" / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    cluster = Site(ranks=2, gpus=0, directory=home, address="http://127.0.0.1:8265")
    real = os.stat

    def open_folders(path, **options):  # whatever the temporary folder's own permissions are
        status = real(path, **options)
        return SimpleNamespace(st_mode=status.st_mode | 0o055) if stat.S_ISDIR(status.st_mode) else status

    monkeypatch.setattr(os, "stat", open_folders)
    failed(ray_cluster.token(cluster), f"chmod 600 {token}")
    failed(ray_cluster.token(site), f"chmod 600 {token}", Status.WARNING)
    token.chmod(0o600)
    assert ray_cluster.token(cluster)[0].status is Status.OK


@pytest.fixture
def dashboard():
    """dashboard(status): a server on loopback that answers everything with this status; gives its address."""
    servers = []

    def start(status: int) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_dashboard_that_answers_strangers(dashboard):
    assert (
        "answers 200 without a token"
        in failed([ray_cluster._refuses_strangers(dashboard(200))], "RAY_AUTH_MODE=token").text
    )
    assert ray_cluster._refuses_strangers(dashboard(401)).status is Status.OK
    failed([ray_cluster._refuses_strangers(dashboard(500))], "dashboard log", Status.WARNING)


def test_a_dashboard_that_is_not_there():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert "does not answer" in failed([ray_cluster._refuses_strangers(address)], "Is the head up").text


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"error": "GetTimeoutError: no answer"}, "raylet.out"),
        ({"sees_directory": False}, "Mount the storage"),
        ({"versions": {"ray": "2.1.0", "dash-dist": "0.1.0"}}, "Install the same Ray"),
    ],
)
def test_a_node_that_is_not_fit(tmp_path, change, advice):
    ray = importlib.metadata.version("ray")
    node = {"address": "10.0.0.1", "host": "a", "gpus": 8.0, "versions": {"ray": ray, "dash-dist": "0.1.0"}}
    node["sees_directory"] = True
    assert ray_cluster._node(node, tmp_path).status is Status.OK
    failed([ray_cluster._node({**node, **change}, tmp_path)], advice)


# the run


@pytest.mark.parametrize(
    ("overrides", "name", "advice"),
    [
        (["data.source=files", "data.paths=[no_such_folder]"], "data", "Correct data."),
        (["data.tokenizer=no_such_file.json"], "tokenizer", "Set data.tokenizer"),
    ],
)
def test_data_that_is_not_there(tmp_path, overrides, name, advice):
    config = load_config(write_config(tmp_path), overrides)
    finding = failed(configuration.data(Site(ranks=2, gpus=0, directory=tmp_path, config=config)), advice)
    assert finding.name == name
    assert "no_such" in finding.text


def test_processes_that_do_not_fit_the_gpus(tmp_path):
    config = load_config(write_config(tmp_path))
    for gpus, status in ((0, Status.OK), (1, Status.WARNING), (3, Status.WARNING), (4, Status.OK)):
        (finding,) = configuration.world_size(Site(ranks=2, gpus=gpus, directory=tmp_path, config=config))
        assert finding.status is status
        if gpus == 1:
            assert "lower parallel.context" in finding.advice


def test_every_stage_is_checked(tmp_path):
    settings = yaml.safe_load(write_config(tmp_path).read_text())
    del settings["training"]["steps"]
    settings["stages"] = [
        {"name": "short", "steps": 5},
        {"name": "long", "steps": 5, "parallel": {"context": 4}, "data": {"source": "files", "paths": "none.txt"}},
    ]
    path = tmp_path / "staged.yaml"
    path.write_text(yaml.safe_dump(settings))
    site = Site(ranks=2, gpus=2, directory=tmp_path, config=load_config(path))
    found = {one.name: one.status for one in configuration.world_size(site)}
    assert found == {"processes, stage short": Status.OK, "processes, stage long": Status.WARNING}
    found = {one.name: one.status for one in configuration.data(site)}
    assert found == {"tokenizer": Status.OK, "data, stage short": Status.OK, "data, stage long": Status.FAILURE}
