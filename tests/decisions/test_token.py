"""The file with a job's token: what is read, what is refused, and how one is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic_launch.env import TOKEN_FILE, without_secrets
from elastic_launch.errors import UsageError
from elastic_launch.host import token
from elastic_launch.operate.__main__ import main
from elastic_launch.rendezvous import factory
from elastic_launch.run import config_from_args, parse_args

SECRET = "s3cret" * 8


def refusal(path: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        token.read(str(path))
    text = str(caught.value)
    assert text.startswith(f"--token-file={path}: ")
    assert "\n" not in text
    assert SECRET not in text
    return text


def secret(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_that_was_made_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.token"
    assert main(["token", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"elastic-run --token-file {path}" in out
    made = token.read(str(path))
    assert len(made) == 64
    assert made.decode() not in out
    assert path.stat().st_mode & 0o777 == 0o600
    assert main(["token", str(path)]) == 2
    assert "File exists; no token was written" in capsys.readouterr().err
    assert token.read(str(path)) == made
    assert main(["token", str(tmp_path / "other")]) == 0
    assert token.read(str(tmp_path / "other")) != made


def test_a_token_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(fd: int, mode: str) -> object:
        os.close(fd)
        return open("/dev/full", mode)

    monkeypatch.setattr(token, "open", full, raising=False)
    assert main(["token", str(tmp_path / "token")]) == 2
    assert "token: No space left on device; no token was written\n" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_the_space_around_a_token_does_not_count_and_a_link_is_followed(tmp_path: Path) -> None:
    path = secret(tmp_path / "token", f"\n  {SECRET}\r\n", 0o400)
    (tmp_path / "link").symlink_to(path)
    assert token.read(str(tmp_path / "link")) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601, 0o777])
def test_a_token_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path / "token", mode=mode)
    assert refusal(path).endswith(f"other users may use it (mode {mode:04o}): chmod 600 {path}")


def test_a_token_of_another_user_is_refused(tmp_path: Path) -> None:
    path = secret(tmp_path / "token")
    os.chown(path, 12345, -1)
    assert refusal(path).endswith("belongs to another user")


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "must hold 32 to 1024 bytes"), ("x" * 31 + "\n", "must hold 32"), ("x" * 1025, "must hold 32 to 1024 bytes")],
)
def test_what_is_too_short_or_too_long_is_no_token(tmp_path: Path, text: str, why: str) -> None:
    assert why in refusal(secret(tmp_path / "token", text))


def test_what_is_no_file_is_no_token(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "not a regular file" in refusal("/dev/zero")
    assert "s a directory" in refusal(tmp_path)
    assert "No such file or directory; elastic-job token makes one" in refusal(tmp_path / "none")
    assert "null byte" in refusal("a\0b")


def created(*words: str, **environ: str) -> object:
    config, *_ = config_from_args(parse_args([*words, "--no-python", "true"]))
    return factory.create_rendezvous(config, environ, lambda line: None)


@pytest.mark.parametrize("nnodes", ["1", "2"])
def test_a_bad_token_is_a_wrong_option_wherever_it_comes_from(tmp_path: Path, nnodes: str) -> None:
    words = "--nnodes", nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:1"
    bad, good = secret(tmp_path / "bad", mode=0o644), secret(tmp_path / "good")
    with pytest.raises(UsageError, match=r"^--token-file=.*bad: other users may use it"):
        created(*words, "--token-file", str(bad))
    with pytest.raises(UsageError, match=r"^ELASTIC_LAUNCH_TOKEN_FILE=.*bad: other users may use it"):
        created(*words, ELASTIC_LAUNCH_TOKEN_FILE=str(bad))
    created(*words, "--token-file", str(good), ELASTIC_LAUNCH_TOKEN_FILE=str(bad))


def test_a_plug_in_takes_no_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--token-file=x: --rdzv-backend mine cannot use a token"):
        created("--rdzv-backend", "mine", "--token-file", "x")
    with pytest.raises(UsageError, match="ELASTIC_LAUNCH_TOKEN_FILE=x: --rdzv-backend mine cannot use a token"):
        created("--rdzv-backend", "mine", ELASTIC_LAUNCH_TOKEN_FILE="x")


@pytest.mark.parametrize("words", [[], ["--adopt"]])
def test_a_name_that_is_empty_by_mistake_does_not_mean_that_there_is_no_token(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args([*words, "--token-file", "", "true"])
    assert ended.value.code == 2
    assert "--token-file='': must name a file" in capsys.readouterr().err
    created(ELASTIC_LAUNCH_TOKEN_FILE="")


def test_a_launcher_in_a_worker_does_not_inherit_token_and_gate() -> None:
    """With one of them alone it would not start."""
    given = {TOKEN_FILE: "a", "PET_TOKEN_FILE": "b", "PET_STORE_GATE": "1", "PET_NNODES": "2"}
    assert without_secrets(given) == {"PET_NNODES": "2"}


def test_a_gate_needs_a_token_and_a_store_that_can_have_one(tmp_path: Path) -> None:
    good = str(secret(tmp_path / "good"))
    c10d = "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:1", "--store-gate"
    for words in (c10d, ("--store-gate",)):
        with pytest.raises(
            UsageError, match=r"^--store-gate: needs a token: --token-file FILE, or ELASTIC_LAUNCH_TOKEN"
        ):
            created(*words)
        created(*words, "--token-file", good)
    with pytest.raises(UsageError, match="--store-gate: with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 a worker serves"):
        created(*c10d, "--token-file", good, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    etcd = "--nnodes", "2", "--rdzv-backend", "etcd", "--rdzv-endpoint", "h:1", "--rdzv-id", "x", "--store-gate"
    with pytest.raises(UsageError, match="--store-gate: --rdzv-backend etcd has no gate; use c10d or static"):
        created(*etcd, "--token-file", good)
    with pytest.raises(UsageError, match="--store-gate: --rdzv-backend mine has no gate"):
        created("--rdzv-backend", "mine", "--store-gate")
