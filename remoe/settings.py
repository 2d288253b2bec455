"""The settings of a router, each declared once.

A setting is a field of a frozen dataclass that `setting` makes. The field holds the setting's flag,
default, help text and range, and every surface is derived from it: the flags of the Megatron entry
point and with them the keys of YAML configs, the routing config of a Megatron model, what a
checkpoint is compared by, the conversion to and from a model for transformers, and the table in
`docs/options.md`. `remoe.hf` alone declares its fields again, because it is exported with every
model and must not need this package; a test compares both.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Interval:
    """An interval of numbers, written as in mathematics: `(0, 1]`."""

    text: str

    def __contains__(self, value: float) -> bool:
        low, high = map(float, self.text[1:-1].split(","))
        above = value >= low if self.text[0] == "[" else value > low
        return above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        low, high = self.text[1:-1].split(", ")
        if high == "inf":
            return f"{'at least' if self.text[0] == '[' else 'above'} {low}"
        return f"in {self.text}"


@dataclass(frozen=True)
class Setting:
    """One setting as the surfaces see it.

    Attributes:
        name: field of the dataclass, and of an exported model's `config.json`.
        type: annotation of that field.
        default: value that changes nothing, or the published one.
        flag: option of the Megatron entry point.
        help: what the setting does.
        within: interval of a number, as `Interval` has it.
        on_resume: what happens to a run whose checkpoint was trained with another value: it is
            refused, warned, or free to change it.
        exported: whether a model for transformers has this setting.
        may_idle: whether a run with another router, or without experts, may set it. The published
            launch scripts do so with some.
        per_granularity: whether it counts experts as they are before granularity splits them.
    """

    name: str
    type: Any
    default: Any
    flag: str
    help: str
    within: str | None = None
    on_resume: Literal["refused", "warned", "free"] = "free"
    exported: bool = False
    may_idle: bool = False
    per_granularity: bool = False

    @property
    def dest(self) -> str:
        """Name of the flag in Megatron's arguments, in YAML configs and in checkpoints."""
        return self.flag.removeprefix("--").replace("-", "_")

    def check(self, value: Any, name: str | None = None) -> None:
        """Refuse a value that the setting cannot have.

        Args:
            value: the value.
            name: what the message calls the setting; None is its own name.

        Raises:
            ValueError: naming the value and what it must be.
        """
        if value is None and self.default is None:
            return
        if not (self._has_type(value) and (self.within is None or value in Interval(self.within))):
            raise ValueError(f"{name or self.name} is {value!r}; it must be {self._allowed()}")

    def _has_type(self, value: Any) -> bool:
        if get_origin(self.type) is Literal:
            return value in get_args(self.type)
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        is_number = isinstance(value, int | float if self._is_float else int)
        return is_number and math.isfinite(value)

    @property
    def _is_float(self) -> bool:
        return float in (self.type, *get_args(self.type))

    def _allowed(self) -> str:
        if self.type is bool:
            return "true or false"
        if self.within is None:
            return f"one of {', '.join(get_args(self.type))}"
        number = "a finite number" if self._is_float else "a whole number"
        default = "it can be left out" if self.default is None else f"the default is {self.default}"
        return f"{number} that is {Interval(self.within)} ({default})"


def setting(default: Any, **facts: Any) -> Any:
    """Make a field of a `Settings` class; `facts` are the attributes of its `Setting`."""
    one = Setting(name="", type=None, default=default, **facts)
    # The second entry is what Megatron's ArgumentGroupFactory makes the flag from.
    argparse_meta = {"arg_names": [one.flag], "dest": one.dest, "help": one.help}
    return field(default=default, metadata={"setting": one, "argparse_meta": argparse_meta})


def settings_of(cls: type) -> list[Setting]:
    """Return the settings of a dataclass, those of its base classes included."""
    given = (f for f in fields(cls) if "setting" in f.metadata)
    return [replace(f.metadata["setting"], name=f.name, type=f.type) for f in given]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of dataclasses with settings: it checks them on construction."""

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            one.check(getattr(self, one.name))
