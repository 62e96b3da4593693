"""The one exception that says: something a person set is wrong."""


class SettingError(ValueError):
    """A setting, file or input is wrong; the message is one line.

    The line names the setting, its value, what is allowed and what to do. Command-line programs print it
    without a traceback and exit with a code other than zero.
    """
