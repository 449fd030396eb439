# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on. Each is one line: what went wrong, why, and what to do."""


class HourLlavaError(Exception):
    """Base of every error caused by input rather than by a bug.

    Args:
        what: the thing that failed, named as the user named it (a path, a recipe, a question).
        why: the reason, in one clause.
        todo: what the user can do about it, in one clause.

    ``str()`` is always the single line ``what: why; todo``, whatever line breaks the parts held.
    """

    def __init__(self, what: object, why: str, todo: str) -> None:
        super().__init__(what, why, todo)
        self.what = str(what)
        self.why = why
        self.todo = todo

    def __str__(self) -> str:
        return " ".join(f"{self.what}: {self.why}; {self.todo}".split())


class VideoError(HourLlavaError):
    """A video cannot be read or written at all."""


class MemoryFileError(HourLlavaError):
    """A saved memory is damaged, incomplete or belongs to another model."""


class AdmissionError(HourLlavaError):
    """What was asked for does not fit into a stated budget, whose numbers are given."""


class MemoryBusyError(MemoryFileError):
    """Another process appends to a memory."""


class StorageError(MemoryFileError):
    """The disk has no room for a memory or the video that it is made of, or refuses to be written to."""


class BusyError(HourLlavaError):
    """A server has as much to do as it takes on; the same question can be asked again."""


class DecoderError(HourLlavaError):
    """The server that is to write the answers cannot be reached, refuses, or breaks off."""


class UnknownMemoryError(MemoryFileError):
    """There is no memory of that name."""


class SourceError(HourLlavaError):
    """What is named as a video's source may not be used, or cannot be got."""


class SourceSizeError(SourceError):
    """A video has more bytes than are taken."""


class SourceConflictError(SourceError):
    """A name stands for a video from elsewhere already."""


class ModelError(HourLlavaError):
    """A model directory is missing, incomplete or not of this architecture."""


class RecipeError(HourLlavaError):
    """A training recipe does not exist or cannot be run."""


class QuestionError(HourLlavaError):
    """A question cannot be asked: it is empty or holds marks of the prompt, or the memory is empty."""


class InputError(HourLlavaError):
    """What a model is given does not fit together, cannot be seen, or is too long; names the sample or the image."""


class DataError(HourLlavaError):
    """Training data cannot be used; names the file and line, or the sample."""

    def __init__(self, what: object, why: str = "", todo: str = "") -> None:
        if not why:
            # torch's DataLoader makes a worker's error anew from the text of its traceback, which ends in our line.
            line = str(what).strip().rpartition("\n")[2].partition("DataError: ")[2]
            rest, _, todo = line.rpartition("; ")
            what, _, why = rest.partition(": ")
        super().__init__(what, why, todo)
