"""The errors a user can meet, with the exit code each one means on the command line."""

from __future__ import annotations


class TransfuseError(Exception):
    """Something failed that is not the fault of the input. Exit code 1."""

    exit_code = 1


class InputError(TransfuseError):
    """A file, option or model that cannot be used; the message names it and the likely cause. Exit code 2."""

    exit_code = 2


class VerificationError(TransfuseError):
    """A check of the result did not hold. Exit code 3."""

    exit_code = 3
