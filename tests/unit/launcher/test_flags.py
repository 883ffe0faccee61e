from __future__ import annotations

import argparse

import pytest

from baton.shared.rpc.flags import add_flag, add_switch


def parse(environ: dict[str, str], *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flag(parser, "--num-blocks", type=int, default=7, help="blocks", environ=environ)
    add_flag(
        parser, "--role", type=str, choices=("prefill", "decode"), help="role", environ=environ
    )
    add_switch(parser, "--reflection", help="reflect", environ=environ)
    return parser.parse_args(argv)


def test_command_line_then_variable_then_default() -> None:
    environ = {"BATON_NUM_BLOCKS": "3"}
    assert parse(environ, "--num-blocks", "5").num_blocks == 5
    assert parse(environ).num_blocks == 3
    assert parse({}).num_blocks == 7


def test_an_empty_variable_is_not_set() -> None:
    assert parse({"BATON_NUM_BLOCKS": "", "BATON_ROLE": ""}).num_blocks == 7


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"BATON_NUM_BLOCKS": "x"}, "BATON_NUM_BLOCKS='x'"),
        ({"BATON_ROLE": "cook"}, "BATON_ROLE='cook': choose from prefill, decode"),
        ({"BATON_REFLECTION": "perhaps"}, "BATON_REFLECTION='perhaps'"),
    ],
)
def test_a_bad_variable_is_named(
    environ: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(environ)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_variable_is_harmless_where_the_flag_is_given() -> None:
    assert parse({"BATON_NUM_BLOCKS": "x"}, "--num-blocks", "5").num_blocks == 5


@pytest.mark.parametrize("scheme", ["tcp", "udp", "TCP"])
def test_what_kubernetes_sets_for_a_service_is_not_ours(
    scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"{scheme}://10.96.0.12:50051"
    environ = {"BATON_NUM_BLOCKS": address}
    assert parse(environ, "--num-blocks", "5").num_blocks == 5
    assert capsys.readouterr().err == "", "what is not looked at is not told"
    assert parse(environ).num_blocks == 7
    [line] = capsys.readouterr().err.splitlines()
    assert f"BATON_NUM_BLOCKS={address} is ignored" in line
    assert parse({"BATON_REFLECTION": address}).reflection is False
    assert f"BATON_REFLECTION={address} is ignored" in capsys.readouterr().err


def test_free_text_is_not_taken_for_a_service() -> None:
    """A URL of the wrong scheme is better refused than replaced by the default."""
    parser = argparse.ArgumentParser()
    url = "tcp://10.0.0.5:6379"
    add_flag(parser, "--redis-url", type=str, help="url", environ={"BATON_REDIS_URL": url})
    assert parser.parse_args([]).redis_url == url


@pytest.mark.parametrize(
    ("environ", "argv", "is_on"),
    [
        ({}, [], False),
        ({}, ["--reflection"], True),
        ({"BATON_REFLECTION": "1"}, [], True),
        ({"BATON_REFLECTION": "1"}, ["--reflection", "no"], False),
        ({"BATON_REFLECTION": "false"}, [], False),
    ],
)
def test_switches(environ: dict[str, str], argv: list[str], is_on: bool) -> None:
    assert parse(environ, *argv).reflection is is_on


def test_a_required_flag_may_come_from_the_environment() -> None:
    parser = argparse.ArgumentParser()
    add_flag(parser, "--model", type=str, required=True, help="model", environ={"BATON_MODEL": "m"})
    assert parser.parse_args([]).model == "m"


def test_help_names_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse({}, "--help")
    assert "default: 7; BATON_NUM_BLOCKS" in " ".join(capsys.readouterr().out.split())
