"""The error of all data sets."""


class DataError(ValueError):
    """A data file is missing, truncated or altered; the message is one sentence that says what to do."""
