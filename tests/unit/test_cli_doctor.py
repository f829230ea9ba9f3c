"""`valley-ray doctor`: each trouble is one line with its fix, and the exit code says whether anything fails."""

import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from valley_ray.cli import check_machine, check_software, doctor, main
from valley_ray.cli.finding import Finding


def ray_auth(**environment: str) -> list[Finding]:
    return list(check_machine.check_ray_auth(environment))


def test_this_environment_is_in_order() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "valley_ray.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    report = json.loads(shown.stdout)
    levels = {one["name"]: one["level"] for one in report["findings"]}
    assert {levels[name] for name in ("python", "packages", "pyav", "torch", "deepspeed")} == {"OK"}, shown.stdout
    assert shown.returncode == (0 if report["ok"] else 1)
    assert all((one["fix"] is None) == (one["level"] == "OK") for one in report["findings"])


def test_lines_come_with_their_fix_and_a_failure_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, odd, bad = (
        Finding("a", "OK", "fine"),
        Finding("b", "WARN", "odd", "mend it"),
        Finding("c", "FAIL", "bad", "buy"),
    )
    monkeypatch.setattr(doctor, "find", lambda: iter([good, odd]))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["OK", "a", "fine"], ["WARN", "b", "odd"], ["→", "mend", "it"]]
    monkeypatch.setattr(doctor, "find", lambda: iter([good, bad]))
    assert main(["doctor"]) == 1
    capsys.readouterr()
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_looking_starts_no_ray() -> None:
    code = "import sys\nfrom valley_ray.cli.doctor import find\nlist(find())\nassert 'ray._raylet' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=240, check=True)


def test_packages_outside_the_tested_ranges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package == "peft":
            raise metadata.PackageNotFoundError(package)
        return "1.0" if package == "transformers" else real(package)

    monkeypatch.setattr(metadata, "version", version)
    *troubles, summary = check_software.check_packages()
    assert {(one.level, one.text.split()[0]) for one in troubles} == {("FAIL", "peft"), ("WARN", "transformers")}
    assert all(one.fix is not None and one.fix.startswith("pip install '") for one in troubles)
    assert "peft" not in summary.text


def test_a_taken_port_names_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(check_machine, "PORTS", {port: ("a test", "use another")})
        [finding] = check_machine.check_ports()
    assert finding.level == "WARN"
    assert finding.fix == "use another"
    if Path("/proc/net/tcp").is_file():
        assert f"process {os.getpid()} " in finding.text
    [finding] = check_machine.check_ports()
    assert finding.level == "OK"


@pytest.mark.parametrize(("port", "option"), [(8265, "--dashboard-port"), (6379, "--port")])
def test_fixes_of_rays_ports_are_commands_that_ray_knows(port: int, option: str) -> None:
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    _, fix = check_machine.PORTS[port]
    [command] = re.findall("`ray start (.+)`$", fix)
    named = {word.partition("=")[0] for word in command.split()}
    assert {"--head", option} == named <= known


def test_rays_tokens_are_looked_for_where_ray_does(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    [open_cluster] = ray_auth(**home)
    assert (open_cluster.level, "no token" in open_cluster.text) == ("WARN", True)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o600)
    [half_on] = ray_auth(**home)
    assert (half_on.level, half_on.fix) == (
        "WARN",
        "export RAY_AUTH_MODE=token in every shell that talks to the cluster",
    )
    assert [one.level for one in ray_auth(**home, RAY_AUTH_MODE="token")] == ["OK"]
    assert [one.level for one in ray_auth(**home, RAY_AUTH_MODE="TOKEN", RAY_AUTH_TOKEN="x")] == ["OK"]
    assert [one.level for one in ray_auth(**home, RAY_AUTH_MODE="disabled")] == ["WARN"]
    assert [one.level for one in ray_auth(**home, RAY_AUTH_MODE="tokens")] == ["FAIL"]
    assert [one.level for one in ray_auth(**home, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))] == ["FAIL"]
    token.chmod(0o644)
    assert [one.fix for one in ray_auth(**home, RAY_AUTH_MODE="token")] == [None, f"chmod 600 {token}"]


def test_full_disks_and_small_shared_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALLEY_STORAGE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(check_machine, "LOW_STORAGE_BYTES", 1 << 62)
    monkeypatch.setattr(check_machine, "MAX_USED", -1.0)
    storage, temporary = check_machine.check_disks()
    assert (storage.level, str(tmp_path) in storage.text) == ("WARN", True)
    assert temporary.level == "FAIL"
    monkeypatch.setattr(check_machine, "MIN_STORAGE_BYTES", 1 << 62)
    assert next(check_machine.check_disks()).level == "FAIL"
    monkeypatch.setattr(check_machine, "ENOUGH_SHM_BYTES", 1 << 62)
    monkeypatch.setattr(check_machine, "OBJECT_STORE_SHARE", 1e9)
    [small] = check_machine.check_shared_memory(tmp_path)
    assert small.level == "WARN"
    assert small.fix is not None
    assert "--shm-size" in small.fix


def test_a_decoder_that_gives_wrong_frames_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from valley_ray.media.frames import VideoFrames
    from valley_ray.media.sandbox import Sandbox

    black = VideoFrames(np.zeros((3, 64, 64, 3), np.uint8), np.arange(3.0))
    monkeypatch.setattr(Sandbox, "frames", lambda *_, **__: black)
    levels = {finding.name: finding.level for finding in check_software.check_decoders()}
    assert levels == {"pyav": "FAIL", "decord": "WARN"}
