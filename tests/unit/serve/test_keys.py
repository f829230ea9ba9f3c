from pathlib import Path

import pytest

from valley_ray.errors import ConfigError
from valley_ray.serve.keys import ANYONE, Keys, check_exposure, read_keys
from valley_ray.serve.refusals import UnauthorizedError

ALICE, BOB, CARL = "a" * 24, "b" * 24, "c" * 24


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VALLEY_API_KEYS", raising=False)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALLEY_API_KEYS", f" {CARL},\n")
    keys = read_keys(written(tmp_path, f"# ours\nalice {ALICE}\n\n{BOB} # no name\n"))
    assert keys.caller(f"Bearer {ALICE}").name == "alice"
    assert keys.caller(f"bearer  {BOB}").name.startswith("key-")
    owners = {keys.caller(f"Bearer {key}").owner for key in (ALICE, BOB, CARL)}
    assert len(owners) == 3


def test_no_replica_ever_sees_a_key(tmp_path: Path) -> None:
    keys = read_keys(written(tmp_path, ALICE))
    assert ALICE not in repr(keys)
    assert ALICE not in repr(keys.caller(f"Bearer {ALICE}"))


def test_wrong_keys_are_refused_and_not_repeated(tmp_path: Path) -> None:
    keys = read_keys(written(tmp_path, ALICE))
    for header in (None, "", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}"):
        with pytest.raises(UnauthorizedError) as refused:
            keys.caller(header)
        assert ALICE[:8] not in str(refused.value)
    with pytest.raises(UnauthorizedError):
        keys.caller("Bearer k\udc80y")


def test_without_keys_everybody_may_ask() -> None:
    assert not read_keys(None)
    assert read_keys(None).caller(None) == ANYONE
    assert Keys().caller("Bearer anything") == ANYONE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# none\n", "holds no key"),
        ("short", "at least 16 characters"),
        ("é" * 20, "printable ASCII"),
        (f"{ALICE}\nother {ALICE}", "keys:2: the key stands there twice"),
        (f"a b {ALICE}", "expected KEY or NAME KEY, got 3 words"),
    ],
)
def test_a_file_that_is_no_list_of_keys_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_keys(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, ALICE)
    read_keys(file)
    assert not caplog.records
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in caplog.text


def test_a_network_is_answered_with_keys_or_by_consent_only(tmp_path: Path) -> None:
    keys = read_keys(written(tmp_path, ALICE))
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"):
        check_exposure(host, Keys(), allow_no_keys=False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        check_exposure(host, keys, allow_no_keys=False)
        check_exposure(host, Keys(), allow_no_keys=True)
        with pytest.raises(ConfigError, match="allow_no_keys: true"):
            check_exposure(host, Keys(), allow_no_keys=False)


def test_every_key_is_compared_whichever_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long an answer takes must not tell which key was meant; the comparison itself is hmac's."""
    compared: list[str] = []
    keys = read_keys(written(tmp_path, f"{ALICE}\n{BOB}\n{CARL}\n"))
    monkeypatch.setattr("hmac.compare_digest", lambda known, given: compared.append(known) or known == given)
    keys.caller(f"Bearer {ALICE}")
    assert len(compared) == 3
