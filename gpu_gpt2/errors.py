"""The package's exceptions. Each message says in one line what is wrong and what to do next."""


class UserError(Exception):
    """An error that a user can correct: the command line prints one line and exits with 1."""


class ConfigError(UserError):
    """An option or a model size that is not possible."""


class DataError(UserError):
    """A file of text, tokens or weights that is missing, damaged or of the wrong kind."""


class DeviceError(UserError):
    """A device that this machine does not have, or that cannot do what was asked."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class TrainingError(UserError):
    """Training diverged: a loss, a gradient or a weight is no longer a finite number."""


class LaunchError(TypeError):
    """A kernel was launched with arguments that its signature does not allow: a caller's bug."""


class KernelError(RuntimeError):
    """The emulator found a bug in a kernel: out of bounds, race, missing barrier and so on."""
