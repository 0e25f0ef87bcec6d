"""Errors that a user can mend: each is one line that names the file, key or shape and what was expected."""


class UserError(Exception):
    """What the commands print as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A config, a mesh or a shape that does not fit."""


class DataError(UserError):
    """A source that can't be read."""


class RecordError(UserError):
    """A record that can't be used; training replaces it by rule and counts it.

    `reason`: a short word for the counts, such as `missing_caption`; the same for all records with that fault.
    `shard`: the file that the record lies in, where that is known.
    """

    def __init__(self, message: str, *, reason: str = "other", shard: str = ""):
        super().__init__(message)
        self.reason, self.shard = reason, shard


class CheckpointError(UserError):
    """A checkpoint that is damaged, unfinished or of something else."""


class TrainingError(UserError):
    """A run that can't start or go on."""
