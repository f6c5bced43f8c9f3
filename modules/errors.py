"""The one error type for a user's mistake.

Whatever we refuse raises it; it costs one to three lines and exit code 2. Any other error is a defect of ours, or of
the machine, and keeps its traceback. It is a `ValueError` because the parser of run files takes those for its answer.
"""


class UserError(ValueError):
    """A mistake of the user; the message names the key or file and the mend."""
