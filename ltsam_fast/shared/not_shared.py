"""Why a network does not qualify."""


class NotShared(ValueError):
    """The network mixes samples, or uses a parameter in a way that cannot be followed; the message names the module."""
