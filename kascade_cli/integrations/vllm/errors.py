"""How the plugin says no."""

from kascade_cli.errors import KascadeError


class Refusal(KascadeError, SystemExit):
    """The server does not start.

    Also a SystemExit: where nobody catches it, Python prints its line alone, without a traceback, and exits with 1.
    """

    def __init__(self, message: object) -> None:
        super().__init__(f"kascade: {message}")
        self.code = str(self)
