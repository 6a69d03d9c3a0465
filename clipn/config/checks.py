"""Checks on the values of settings."""

from __future__ import annotations

from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16")


def require(ok: bool, key: str, value: Any, expected: str) -> None:
    """Raise ValueError, one line with the key, the value and what is expected, unless ok."""
    if not ok:
        raise ValueError(f"{key}={value!r}: expected {expected}")


class Section:
    """Checks on the fields of a section, whose name is that of its class."""

    def _check(self, name: str, ok: bool, expected: str) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        require(ok, f"{section}.{name}", getattr(self, name), expected)

    def _at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            self._check(name, getattr(self, name) >= minimum, f"{minimum} or more")

    def _one_of(self, name: str, choices: tuple[str | None, ...]) -> None:
        expected = ", ".join("null" if choice is None else choice for choice in choices)
        self._check(name, getattr(self, name) in choices, f"one of {expected}")

    def _seed(self, name: str, *seeds: int) -> None:
        self._check(name, all(0 <= seed < 2**31 for seed in seeds), "0 or more, up to 2147483647")
