"""Settings of ``--rdzv-conf`` for etcd, above all passwords: where they are refused, and where they are not shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_launch import LaunchConfig, UsageError
from elastic_launch.cli import plan
from elastic_launch.env import without_secrets
from elastic_launch.parsing import parse_rdzv_conf
from elastic_launch.rendezvous.factory import create_built_in
from elastic_launch.run import config_from_args, parse_args

CONF = "user=ann,password=s3cret,protocol=http"


def etcd_config(conf: dict[str, str]) -> LaunchConfig:
    return LaunchConfig(1, 2, 1, run_id="j", rdzv_backend="etcd", rdzv_endpoint="127.0.0.1:1", rdzv_configs=conf)


@pytest.mark.parametrize("text", ["user=ann,password=s3,cret", "password=s3,=cret"])
def test_no_part_of_a_password_is_in_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="a password with a comma goes into a file") as caught:
        parse_rdzv_conf(text)
    assert "cret" not in str(caught.value)


def test_no_part_of_a_password_is_in_a_warning() -> None:
    told: list[str] = []
    create_built_in(etcd_config({**parse_rdzv_conf(CONF), "cret": "x"}), {}, told.append)
    assert any("ignoring 1 unknown setting" in line for line in told)
    assert not [line for line in told if "cret" in line]


def test_a_password_that_crosses_the_network_in_the_clear_is_warned_about(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("s3cret\n")
    file.chmod(0o600)
    for more in ({"password": "s3cret"}, {"password_file": str(file)}):
        told: list[str] = []
        create_built_in(etcd_config({"user": "ann", "protocol": "http", **more}), {}, told.append)
        assert [line for line in told if "crosses the network unencrypted" in line]
        with pytest.raises(UsageError, match="pass protocol=https, or protocol=http"):
            create_built_in(etcd_config({"user": "ann", **more}), {}, told.append)


def test_a_deadline_is_shorter_than_heartbeats_last() -> None:
    with pytest.raises(UsageError, match="with etcd at most 1800 s, not 3000 s"):
        create_built_in(etcd_config({"keep_alive_interval": "1000"}), {}, lambda line: None)


def test_a_dry_run_shows_no_password() -> None:
    args = parse_args(["--rdzv-conf", CONF, "-m", "this"])
    for meant in (None, config_from_args(args)[0]):
        shown = {setting.name: setting.value for setting in plan.settings(args, meant, {})}
        assert shown["rdzv-conf"] == "user=ann,password=***,protocol=http"


def test_workers_do_not_inherit_a_password() -> None:
    for text in (CONF, "user=ann, password = s3cret", "'password=s3cret'"):
        assert without_secrets({"PET_RDZV_CONF": text, "A": "1"}) == {"A": "1"}
    kept = {"PET_RDZV_CONF": "user=ann,password_file=/run/secrets/etcd", "B": "password=x"}
    assert without_secrets(kept) == kept
