"""The error for what a user can put right."""


class UserError(ValueError):
    """Something in the command, the config or the files is wrong; the message is one sentence saying what to do."""


ARGUMENT_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What functions raise for arguments that they were not made for."""
