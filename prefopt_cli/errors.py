"""The two ways in which a command ends badly, and the exit code of each.

Every message says what is wrong, where, and what to do about it; the command line prints it without
a traceback (``--debug`` shows the traceback).
"""


class PrefoptError(Exception):
    """Something failed that the user did not get wrong: a full disk, a loss that is not finite."""

    exit_code = 1


class UserError(PrefoptError):
    """The user's input cannot work as it stands: recipe, data, model name, output folder."""

    exit_code = 2
