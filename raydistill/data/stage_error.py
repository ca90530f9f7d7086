"""The error of a Ray Data stage as the driver sees it.

Imports Ray's exceptions alone: it is also read inside the environments of the reward packages.
"""

from __future__ import annotations

from ray.exceptions import UserCodeException


class StageError(UserCodeException):
    """What a stage raised: its text, its type's name, its traceback, and whether it is a TeacherError.

    Ray Data wraps errors of stages and loses their causes on the way to the driver; this one it hands out, its
    message lengthened by advice. Attributes stay as they are.
    """

    def __init__(self, text: str, kind: str = "", trace: str = "", of_teacher: bool = False) -> None:
        super().__init__(text)
        self.text, self.kind, self.trace, self.of_teacher = text, kind, trace, of_teacher
