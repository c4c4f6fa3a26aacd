"""The declaration of a setting: its name, meaning, range and default."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from gpu_gpt2.errors import ConfigError

EPOCHS: Final = re.compile(r"(\d+\.?\d*) ?epochs?")  # a length in passes over the training text
AUTO: Final = "auto"  # value of an option that leaves the choice to gpu-gpt2


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A setting of TrainConfig as the command line, error messages and the docs show it."""

    name: str  # name of the field of TrainConfig
    kind: type  # str, int, float or bool
    default: Any  # on every device; None if each device has its own, or if the default is AUTO
    help: str
    group: str  # heading of the help under which the option is listed
    metavar: str = ""  # placeholder of the value in the help, such as the unit of a number
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None  # only beside a minimum
    above: int | None = None  # exclusive minimum
    below: int | None = None  # exclusive maximum
    auto: str = ""  # description of the value that AUTO stands for; "" if AUTO is not accepted
    in_epochs: bool = False  # the command line and TOML files also take epochs: "3epochs"
    resumable: bool = False  # may change when a run is resumed

    @property
    def flag(self) -> str:
        """The name on the command line: --total-batch-tokens."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def allowed(self) -> str:
        """The range of a number (">= 0 and < 1"), or the choices; "" if there is no limit."""
        if self.choices:
            return ", ".join((*self.choices, AUTO) if self.auto else self.choices)
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum} to {self.maximum}"
        bounds = ((">=", self.minimum), (">", self.above), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)

    def check(self, value: object, *, takes_auto: bool = False) -> None:
        """Raises ConfigError, which names the option, if the setting cannot have this value.

        With `takes_auto` the message also offers AUTO, for options that accept it.
        """
        if not self._allows(value):
            text = f"{self._expected()}{f', or {AUTO}' if takes_auto else ''}"
            raise ConfigError(f"{self.flag} must be {text}, not {value!r}")

    def check_given(self, value: Any) -> Any:
        """Returns a value from the command line or a TOML file, as the type of the setting.

        AUTO and epochs are left as they are. Raises ConfigError as `check` does.
        """
        if isinstance(value, str) and self.kind is int:
            if (self.auto and value == AUTO) or (self.in_epochs and EPOCHS.fullmatch(value)):
                return value
            with suppress(ValueError):
                value = int(value)
        elif self.auto and value == AUTO:
            return value
        if self.in_epochs and not self._allows(value):
            raise ConfigError(
                f"{self.flag} must be {self._expected()}, or epochs as in 3epochs, not {value!r}"
            )
        self.check(value, takes_auto=self.auto != "")
        return value

    def _allows(self, value: Any) -> bool:
        if type(value) is not self.kind and (self.kind, type(value)) != (float, int):
            return False
        if self.kind is float and not math.isfinite(value):
            return False
        return (
            (not self.choices or value in self.choices)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kinds = {
            str: "text",
            int: "a whole number",
            float: "a finite number",
            bool: "true or false",
        }
        return f"{kinds[self.kind]} {self.allowed}".strip()


def declare(help: str, group: str, **more: Any) -> dict[str, Any]:  # noqa: A002
    """Returns the metadata of a field of TrainConfig: all of Option but name, kind and default."""
    return {"help": help, "group": group, **more}
