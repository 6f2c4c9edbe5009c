"""The error that means "the input is wrong, not the program"."""


class UserError(ValueError):
    """A mistake in a setting, a file or a call that the user can mend.

    The message names the setting, the value received, what is allowed and what to do. The command line prints it
    without a traceback and exits with code 2; as a library it is an ordinary `ValueError`.
    """
