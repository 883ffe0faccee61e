from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from baton.services.launcher.__main__ import main
from baton.services.launcher.commands import build_parser, generate_request
from baton.services.launcher.roles import (
    RoleCounts,
    StackConfig,
    UsageError,
    gateway_specs,
    worker_specs,
)
from baton.services.launcher.stubs import contract_digest, why_stale
from baton.services.launcher.up_flags import stack_config


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "PREFILL", "DECODE", "BOTH", "PORT", "HOST", "REDIS_URL", "TARGET"):
        monkeypatch.delenv(f"BATON_{name}", raising=False)


def up(*flags: str) -> StackConfig:
    return stack_config(build_parser().parse_args(["up", "--model", "m", *flags]))


def generate(*flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["generate", *flags])


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ([], RoleCounts(1, 1, 0)),
        (["--both", "2"], RoleCounts(0, 0, 2)),
        (["--prefill", "2", "--decode", "3"], RoleCounts(2, 3, 0)),
        (["--decode", "2"], RoleCounts(0, 2, 0)),
    ],
)
def test_any_role_flag_makes_the_others_zero(flags: list[str], counts: RoleCounts) -> None:
    assert up(*flags).counts == counts


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("status now", "baton status: unrecognized arguments: now (baton status --help says more)"),
        ("chat --prompt hi", "baton chat: unrecognized arguments: --prompt hi"),
        ("up --model m --prefil 1", "baton up: unrecognized arguments: --prefil 1"),
        ("chat --temperature hot", "argument --temperature: 'hot' is no number"),
        ("status --target http://h:8000", "'http://h:8000' speaks HTTP"),
        ("health h", "argument HOST:PORT: 'h' is no HOST:PORT, such as"),
        ("fetch smollm2 another", "one model at a time"),
    ],
)
def test_a_wrong_use_is_told_in_the_words_of_the_command_that_was_meant(
    argv: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(argv.split())
    error = capsys.readouterr().err
    assert raised.value.code == 2 and told in error and error.count("\n") == 1


def test_a_target_may_be_written_as_load_tests_have_it() -> None:
    args = generate("--prompt", "x", "--target", "grpc://[::1]:7")
    assert args.target == "[::1]:7"


@pytest.mark.parametrize("flags", [["--prefill", "1"], ["--decode", "1"], ["--both", "0"]])
def test_workers_without_a_route_need_a_shared_directory(flags: list[str]) -> None:
    with pytest.raises(UsageError, match="one of role both"):
        up(*flags).check()
    up(*flags, "--redis-url", "redis://elsewhere").check()


def test_each_worker_is_one_process_with_its_own_id() -> None:
    config = up("--prefill", "2", "--both", "1", "--num-blocks", "64", "--max-model-len", "512")

    specs = worker_specs(config, "unix:///valkey", Path("/dev/shm/x"))

    assert [spec.name for spec in specs] == ["prefill-0", "prefill-1", "both-0"]
    argv = " ".join(specs[1].argv)
    for part in (
        "-m baton.services.worker --role prefill --worker-id prefill-1 --model m",
        "--redis-url unix:///valkey --cluster default --host 127.0.0.1 --port 0",
        "--device auto --dtype auto --block-size 16 --shm-dir /dev/shm/x",
        "--num-blocks 64 --max-model-len 512",
    ):
        assert part in argv


def test_workers_are_told_whose_code_to_take() -> None:
    [spec, _] = worker_specs(up("--model-impl", "transformers"), "unix:///v", Path("/dev/shm/x"))
    assert spec.argv[spec.argv.index("--model-impl") + 1] == "transformers"


def test_every_role_is_told_the_models_name() -> None:
    config = up("--model-name", "org/tale")
    specs = worker_specs(config, "unix:///valkey", Path("/dev/shm/x"))
    specs += gateway_specs(config, "redis://r", 7000, None)
    for spec in specs:
        assert spec.argv[spec.argv.index("--model-name") + 1] == "org/tale"


def test_what_was_not_given_is_left_to_the_worker() -> None:
    [spec, _] = worker_specs(up(), "unix:///valkey", Path("/dev/shm/x"))
    assert "--num-blocks" not in spec.argv
    assert "--max-model-len" not in spec.argv
    assert "--model-name" not in spec.argv


def test_workers_may_choose_the_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [spec, _] = worker_specs(up("--max-model-len", "AUTO"), "unix:///valkey", Path("/dev/shm/x"))
    assert "--max-model-len auto" in " ".join(spec.argv)
    monkeypatch.setenv("BATON_MAX_MODEL_LEN", "auto")
    assert up().max_model_len == "auto"
    for bad in ("0", "1", "-1", "long", "1.5", str(2**31)):
        with pytest.raises(SystemExit):
            up("--max-model-len", bad)
        assert "--max-model-len: " in capsys.readouterr().err


def test_the_gateway_listens_where_it_is_told() -> None:
    [spec] = gateway_specs(up("--host", "0.0.0.0", "--reflection"), "redis://r", 7000, None)
    argv = spec.argv
    assert " ".join(argv) == (
        "-m baton.services.gateway --model m --redis-url redis://r --cluster default"
        " --host 0.0.0.0 --port 7000 --http-port none --drain-s 30 --reflection"
        " --metrics-port none"
    )
    [spec] = gateway_specs(up("--generation-config", "none"), "redis://r", 7000, None)
    assert "--generation-config none" in " ".join(spec.argv)


def test_how_the_model_writes_reaches_the_gateway() -> None:
    config = up("--tool-format", "hermes", "--reasoning-format", "none")
    [spec] = gateway_specs(config, "redis://r", 7000, None)
    assert "--tool-format hermes --reasoning-format none" in " ".join(spec.argv)


@pytest.mark.parametrize(
    ("flag", "ports"),
    [
        ("9000", ["9000", "9001", "9002", "9003"]),
        ("0", ["0", "0", "0", "0"]),
        ("none", ["none", "none", "none", "none"]),
    ],
)
def test_each_process_has_its_own_metrics_port(flag: str, ports: list[str]) -> None:
    config = up("--gateways", "2", "--metrics-port", flag)
    gateways = gateway_specs(config, "redis://r", 7000, None)
    specs = gateways + worker_specs(config, "redis://r", Path("/dev/shm/x"))
    given = [spec.argv[spec.argv.index("--metrics-port") + 1] for spec in specs]
    assert given == ports


def test_variables_stand_in_for_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_MODEL", "from-environment")
    monkeypatch.setenv("BATON_BOTH", "3")
    config = stack_config(build_parser().parse_args(["up", "--port", "1"]))
    assert (config.model_dir, config.counts.both, config.port) == (Path("from-environment"), 3, 1)


def test_only_what_was_given_is_sent() -> None:
    request = generate_request(generate("--prompt", "hello", "--temperature", "0", "--seed", "0"))
    assert request.text == "hello"
    assert [field.name for field, _ in request.sampling.ListFields()] == ["temperature", "seed"]


def test_every_sampling_flag_is_sent() -> None:
    flags = "--token-ids 5,6 --max-tokens 9 --temperature 0.5 --top-p 0.25 --top-k 7 --min-p 0.125"
    more = ["--seed", str(2**64 - 1), "--stop", "a", "--stop", "b c", "--ignore-eos"]
    request = generate_request(generate(*flags.split(), *more))
    assert list(request.token_ids.token_ids) == [5, 6]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.25)
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (7, 0.125, 2**64 - 1)
    assert (list(sampling.stops), sampling.ignore_eos) == (["a", "b c"], True)


def test_every_flag_of_penalties_and_bans_is_sent() -> None:
    flags = "--token-ids 5 --presence-penalty 1 --frequency-penalty -0.5 --repetition-penalty 1.25"
    more = "--min-tokens 3 --logit-bias 7:-100,2:5.5 --allowed-token-ids 2,7 --bad-words a"
    sampling = generate_request(
        generate(*flags.split(), *more.split(), "--bad-words", "b c")
    ).sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -0.5)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.25, 3)
    assert dict(sampling.logit_bias) == {7: -100, 2: 5.5}
    assert (list(sampling.allowed_token_ids), list(sampling.bad_words)) == ([2, 7], ["a", "b c"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("generate", "one of the arguments --prompt --token-ids is required"),
        ("generate --prompt a --token-ids 1", "not allowed with"),
        ("generate --token-ids 1,x", "'1,x' is no comma-separated list of token ids"),
        ("generate --token-ids 1,-2", "no comma-separated list of token ids"),
        ("generate --token-ids 4294967296", "no comma-separated list of token ids"),
        ("generate --prompt a --seed -1", "-1 is not between 0 and 18446744073709551615"),
        ("generate --prompt a --max-tokens many", "'many' is no whole number"),
        ("generate --prompt a --logit-bias 1:2,3", "'3' is no token id with a number"),
        ("generate --prompt a --logit-bias 2:1,-1:2", "'-1:2' is no token id with a number"),
        ("generate --prompt a --timeout nan", "'nan' is no length of time"),
        ("generate --prompt a --timeout 1e12", "'1e12' is more than 1000000000 seconds"),
        ("up", "required: --model"),
        ("up --model m --prefill -1", "-1 is not between 0 and 1024"),
        ("up --model m --port 65536", "65536 is not between 0 and 65535"),
        ("up --model m --dtype float8", "invalid choice: 'float8'"),
        ("up --model m --model-impl theirs", "invalid choice: 'theirs'"),
        ("sideways", "invalid choice"),
    ],
)
def test_bad_usage_says_what_is_wrong(
    argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(argv.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_stubs_that_are_not_of_the_contract_are_told_of_before_anything_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contract, made = tmp_path / "protos/baton/v1/types.proto", tmp_path / "shared/gen/.generated"
    assert why_stale(tmp_path) is None, "a wheel holds stubs alone"
    for file in (contract, made):
        file.parent.mkdir(parents=True)
    contract.write_text("message Old {}")
    made.write_text(f"{contract_digest(tmp_path)}\n")
    assert why_stale(tmp_path) is None
    contract.write_text("message New {}")
    monkeypatch.setattr("baton.services.launcher.__main__.why_stale", lambda: why_stale(tmp_path))
    assert main(["status"]) == 2
    assert "run `make protos`" in capsys.readouterr().err
