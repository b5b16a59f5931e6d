"""The error that says why a network does not qualify."""

REMEDY = 'use plan="published"'


class NotShared(ValueError):
    """The network mixes samples, or uses a parameter in a way that is not supported; the message names the module."""
