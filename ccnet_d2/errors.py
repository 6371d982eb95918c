"""The error for what a user can put right."""


class UserError(ValueError):
    """Something in the command, the config or the files is wrong; the message is one sentence saying what to do."""
