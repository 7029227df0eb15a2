"""The configuration: what it refuses, and JSON both ways."""

import re

import pytest

from moe_compiler.config import CompileConfig

BAD = [
    ({"strategy": "magic"}, "`strategy` must be one of 'dynamo'"),
    ({"quantizer": "awq"}, "`quantizer` must be one of 'gptq', 'rtn', 'hqq', but is 'awq'"),
    ({"rule": "swap"}, "`rule` must be one of"),
    ({"master": "disk"}, "`master` must be one of 'auto', 'checkpoint', 'memory', 'cache', but is 'disk'"),
    ({"master": "cache"}, "`master` must not be 'cache' where `pool` is 'lowrank'"),
    ({"pool": "rows"}, "`pool` must be one of 'lowrank', 'channels', but is 'rows'"),
    ({"pool": "channels", "rule": "lowrank"}, "`rule` must not be 'lowrank' where `pool` is 'channels'"),
    (
        {"pool": "channels", "rule": "compensate", "master": "cache"},
        "`rule` must not be 'compensate' where `master` is 'cache': it needs whole weights",
    ),
    ({"widths": (2, 3)}, r"`widths` must be some of (2, 4, 6, 8), but is (2, 3)"),
    ({"widths": ()}, r"`widths` must be some of (2, 4, 6, 8), but is ()"),
    ({"uniform_bits": 5}, "`uniform_bits` must be one of None, 2, 4, 6, 8, but is 5"),
    ({"shared_bits": 3}, "`shared_bits` must be one of 2, 4, 6, 8, but is 3"),
    ({"group_size": 100}, "`group_size` must be one of 32, 64, 128, 256, 512, 1024, but is 100"),
    ({"target_bits": 0}, "`target_bits` must lie in (0, 16], but is 0"),
    ({"pool_fraction": 1.5}, "`pool_fraction` must lie in [0, 1], but is 1.5"),
    ({"overlap": -0.1}, "`overlap` must lie in [0, 1], but is -0.1"),
    (
        {"pool": "channels", "master": "cache", "cache_fraction": 0.005},
        "`cache_fraction` must be at least `pool_fraction`, but 0.005 < 0.01",
    ),
    ({"insurance": -1}, "`insurance` must not be negative, but is -1"),
    ({"sequence_length": 1}, "`sequence_length` must be at least 2, but is 1"),
    ({"tokens_per_batch": 0}, "`tokens_per_batch` must be at least 2, but is 0"),
    ({"tokens_per_batch": 64}, "`sequence_length` must be at most `tokens_per_batch`, but 512 > 64"),
    ({"hessian_memory_bytes": 0}, "`hessian_memory_bytes` must be at least 1, but is 0"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CompileConfig(**values)  # type: ignore[arg-type]


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(
        TypeError, match="`target` is not an option of CompileConfig; the options are strategy, target_bits"
    ):
        CompileConfig().with_overrides(target=3)


def test_json_both_ways() -> None:
    config = CompileConfig(strategy="budget", target_bits=2.8, widths=(2, 4), seed=7)
    assert CompileConfig.from_json(config.to_json()) == config
    assert CompileConfig.from_json("{}") == CompileConfig()


def test_the_rule_is_that_of_the_pool_unless_it_is_given() -> None:
    config = CompileConfig()
    assert (config.pool, config.rule) == ("lowrank", "lowrank")
    channels = config.with_overrides(pool="channels")
    assert channels.rule == "restore"
    assert channels.with_overrides(pool="lowrank").rule == "lowrank"
    assert config.with_overrides(rule="compensate").with_overrides(pool="channels").rule == "compensate"
    assert CompileConfig.from_json('{"pool": "channels"}').rule == "restore"
