"""Errors of V-Zero. Each also inherits the standard type a caller would expect."""


class VZeroError(Exception):
    """Base of every error that V-Zero raises on purpose."""


class ConfigError(VZeroError, ValueError):
    """A setting, or a combination of settings, that cannot be used."""


class InputError(VZeroError, ValueError):
    """Data handed to a function that breaks the function's stated contract."""


class NoDisjointCropError(InputError):
    """No negative crop can be made beside the positive one; the sample is to be quarantined."""
