"""The errors that reach a user, each with the exit code that the command line gives it.

AttrcliError (70)
├── UsageError (2)           an option, a configuration or an output path that cannot be used
├── InputError (3)           one input that cannot be read or explained; its row records the message
│   └── NonFiniteError       NaN or Inf, with the first node that made it
├── ModelError (4)           the model cannot be loaded, or does not support what was asked
│   ├── UnsupportedOp        an op without an importer or without a rule
│   ├── TooLarge             loops that unroll to more than a graph may hold
│   └── WeightError          a stored tensor that holds NaN
└── NoInputsError (5)        nothing matched INPUTS

A message says what was given, what is accepted, and what to do.
"""


class AttrcliError(Exception):
    """Base of every error that is the user's to read; caught once, at the edge."""

    exit_code = 70


class UsageError(AttrcliError):
    """An option, a configuration file or an output path cannot be used as given."""

    exit_code = 2


class InputError(AttrcliError):
    """One input cannot be read or explained; the others are unaffected."""

    exit_code = 3


class NonFiniteError(InputError):
    """A NaN or an infinity came out of the model for one input."""


class ModelError(AttrcliError):
    """The model file cannot be loaded, or the model does not support the method."""

    exit_code = 4


class UnsupportedOp(ModelError):
    """A node's op has no importer, or no rule in the method that was asked for."""


class TooLarge(ModelError):
    """A model whose loops unroll to more than a graph may hold, or do not end."""


class WeightError(ModelError):
    """A stored tensor of the model holds NaN, whatever the input."""


class NoInputsError(AttrcliError):
    """No file matched INPUTS."""

    exit_code = 5


class AttrcliWarning(UserWarning):
    """Something that a user should know and that does not stop the run."""
