"""The exceptions a user can meet: each says in one line what is wrong and what to do next."""


class UserError(Exception):
    """A mistake a user can mend: the command line prints it as one line and exits with 1."""


class ConfigError(UserError):
    """An option or a model size that cannot work."""


class DataError(UserError):
    """A file of text, tokens or weights that is missing, damaged or of the wrong kind."""


class DeviceError(UserError):
    """A device that is not here, or cannot do what was asked."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class TrainingError(UserError):
    """Training went somewhere it cannot come back from, such as a loss that is not a number."""


class LaunchError(TypeError):
    """A kernel was called with arguments its signature does not allow: a bug in the caller."""


class KernelError(RuntimeError):
    """The emulator caught a kernel doing what the hardware would not forgive."""
