"""The one error that is not the user's mistake: something cannot be reached or decided here."""


class Unavailable(RuntimeError):
    """A data set, a device or a measurement cannot be had on this machine; commands exit 3 with its one line."""
