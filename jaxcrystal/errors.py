"""The one error that a user caused and can mend: the command line prints its message and nothing else."""


class UserError(Exception):
    """Bad input. The message names the file, row or value at fault and says what would have been right."""
