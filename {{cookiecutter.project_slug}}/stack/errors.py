"""The one error of the stack: what went wrong and what to do, in one message for a person."""


class StackFailed(Exception):
    """The stack could not do what was asked."""
