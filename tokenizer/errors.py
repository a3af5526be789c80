"""The two ways outside input can be wrong, and how an entry point reports them.

`RequestError`     what the caller asked for or handed in: a path, a value, a sound.
`CheckpointError`  what lies in a model folder: missing, half copied, wrong shape.
Both carry one or two lines that name the value, what is allowed and the fix.
Broken invariants inside the package are assertions, never these.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class StepAudioError(Exception):
    """Something the user can mend; its text is meant to be read by them."""


class RequestError(StepAudioError):
    """A request that cannot be served: bad file, value, text or sound."""


class CheckpointError(StepAudioError):
    """A model folder that cannot be loaded as it lies on disk."""


def describe(error: BaseException) -> str | None:
    """One or two lines for an error the user can mend; None for a defect of ours."""
    if isinstance(error, StepAudioError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full while writing {error.filename or 'the output'}: free some space and run again"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'file'}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of GPU memory: lower --batch-size or the length of the input, "
            "choose a smaller --dtype, or spread the model with --device-map auto"
        )
    return None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point: 0 on success, 2 with a short message on bad input, 130 on Ctrl-C.

    A defect of ours still ends in a traceback, so that it can be reported.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        message = describe(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 2
    raise SystemExit(code)
