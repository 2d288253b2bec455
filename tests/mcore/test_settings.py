"""A setting of a router is declared once, and every surface follows from the declaration."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from remoe.config import ROUTINGS, ReLURouting, ReMoELayerConfig, TopKRouting
from remoe.settings import setting, settings_of
from tests.mcore import tiny

SETTINGS = {s.dest: s for routing in ROUTINGS.values() for s in settings_of(routing)}


@dataclass(frozen=True, kw_only=True)
class Extended(ReLURouting):
    """ReLU routing with a setting more."""

    temperature: float = setting(
        2.0,
        flag="--moe-relu-temperature",
        help="Divide the logits by this number.",
        within="(0, inf)",
        on_resume="refused",
        exported=True,
    )


def surfaces(path: Path) -> dict[str, Any]:
    """What the surfaces make of one setting more, whose value in a config is 3.0."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron.remoe import options
    from megatron.remoe.arguments import add_arguments, check, routing_from_args
    from megatron.remoe.convert import architecture
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.config import load_config
    from megatron.remoe.train import saved

    with mock.patch.dict(ROUTINGS, {"relu": Extended}):
        parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
        args = parser.parse_args(to_argv(load_config(path).flags, parser))
        args.kv_channels = args.hidden_size // args.num_attention_heads
        config = architecture.to_config(args)
        found: dict[str, Any] = {
            "help": next(a.help for a in parser._actions if a.dest == "moe_relu_temperature"),
            "default": parser.get_default("moe_relu_temperature"),
            "routing": routing_from_args(args).temperature,
            "config.json": config["temperature"],
            "flags of an exported model": architecture.to_flags(config, 128)[
                "moe_relu_temperature"
            ],
            "compared with a checkpoint": saved.compared("relu")["moe_relu_temperature"],
            "documentation": [
                line for line in options.to_markdown().splitlines() if "temperature" in line
            ],
        }
        for name, changes in {
            "out of range": {"moe_relu_temperature": 0.0},
            "with another router": {"moe_routing": "topk", "moe_relu_routing": False},
            "without experts": {
                "moe_routing": None,
                "moe_relu_routing": False,
                "num_experts": None,
            },
        }.items():
            with pytest.raises(ValueError) as error:
                check(argparse.Namespace(**vars(args) | changes))
            found[name] = str(error.value)
    return found


def test_a_setting_that_is_added_appears_everywhere(call, tmp_path):
    path = tiny.write_config(tmp_path / "tiny.yaml", moe_relu_temperature=3.0)
    found = call(surfaces, path)
    assert found.pop("out of range").startswith(
        "moe_relu_temperature is 0.0; it must be a finite number that is above 0"
    )
    assert found.pop("with another router").startswith(
        "moe_relu_temperature is set, but it is a setting of ReLU routing, and the router is topk"
    )
    assert found.pop("without experts").startswith(
        "moe_relu_temperature is set but num_experts is not"
    )
    assert found == {
        "help": "Divide the logits by this number.",
        "default": 2.0,
        "routing": 3.0,
        "config.json": 3.0,
        "flags of an exported model": 3.0,
        "compared with a checkpoint": 2.0,
        "documentation": [
            "| `--moe-relu-temperature` | `temperature` | 2.0 | Divide the logits by this number. "
            "| refused |"
        ],
    }


def test_the_published_flags_and_exported_names_stay():
    assert {(s.flag, s.name, s.exported) for s in SETTINGS.values()} == {
        ("--moe-relu-max-assignments", "max_assignments", False),
        ("--moe-relu-l1-reg-coeff-init", "l1_coeff_init", True),
        ("--moe-relu-l1-reg-coeff-multiplier", "l1_coeff_multiplier", True),
        ("--moe-relu-load-balancing", "load_balancing", True),
        ("--moe-relu-max-active-experts", "max_active_experts", True),
        ("--moe-relu-at-least-one-expert", "at_least_one_expert", True),
        ("--moe-topk-warmup-steps", "warmup_steps", False),
        ("--moe-topk-warmup-topk", "warmup_topk", False),
        ("--moe-router-recurrence", "recurrence", True),
        ("--moe-router-recurrent-size", "recurrent_size", True),
        ("--moe-router-recurrent-init-std", "recurrent_init_std", False),
        ("--moe-router-recurrent-passing", "recurrent_passing", True),
        ("--moe-router-recurrent-projection", "recurrent_projection", True),
        ("--moe-soft-slots-per-expert", "slots_per_expert", False),
        ("--moe-relu-l1-reg-coeff-per-layer", "l1_coeff_per_layer", True),
        ("--moe-top-p-init", "top_p_init", False),
        ("--moe-top-p-multiplier", "top_p_multiplier", True),
        ("--moe-expert-threshold-decay", "expert_threshold_decay", True),
        ("--moe-null-experts", "num_null_experts", True),
    }


def test_the_layer_for_torch_has_the_settings_of_relu_routing():
    layer = ReMoELayerConfig(hidden_size=1, ffn_hidden_size=1)
    assert settings_of(type(layer)) == settings_of(ReLURouting)
    for one in settings_of(ReLURouting):
        assert getattr(layer, one.name) == one.default


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (ReLURouting, {"l1_coeff_init": float("nan")}, "l1_coeff_init is nan; it must be a finite"),
        (ReLURouting, {"l1_coeff_init": "1"}, "l1_coeff_init is '1'; it must be a finite number"),
        (ReLURouting, {"max_active_experts": 0}, "max_active_experts is 0; .* that is at least 1"),
        (ReLURouting, {"max_active_experts": True}, "max_active_experts is True; it must be a who"),
        (
            ReLURouting,
            {"max_assignments": 1.5},
            "max_assignments is 1.5; it must be a whole",
        ),
        (ReLURouting, {"load_balancing": "x"}, "load_balancing is 'x'; it must be one of aux_loss"),
        (ReLURouting, {"at_least_one_expert": 1}, "at_least_one_expert is 1; it must be true or"),
        (TopKRouting, {"recurrence": "lstm"}, "recurrence is 'lstm'; it must be one of none, gru"),
        (
            ReLURouting,
            {"recurrence": "rnn", "recurrent_size": 0},
            "recurrent_size is 0; it must be a whole number that is at least 1",
        ),
        (
            ReLURouting,
            {"recurrent_size": 64},
            "recurrent_size is 64, but recurrence is none; choose gru or rnn, or leave",
        ),
        (
            TopKRouting,
            {"recurrent_passing": "none"},
            "recurrent_passing is none, but recurrence is none; choose gru or rnn, or leave",
        ),
        (
            TopKRouting,
            {"recurrent_projection": "shared"},
            "recurrent_projection is shared, but recurrence is none; choose gru or rnn, or leave",
        ),
        (TopKRouting, {"warmup_steps": -1}, "warmup_steps is -1; .* that is at least 0"),
    ],
)
def test_a_value_is_checked_where_it_is_given(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        cls(**changes)


def test_every_setting_passes_at_its_default():
    for one in SETTINGS.values():
        one.check(one.default)
