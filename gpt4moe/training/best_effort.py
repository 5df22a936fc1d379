"""Work whose failure must not stop training: reports and other extras."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Logs a failure as one line and goes on; training and exit status stay as they are. No collectives inside."""
    try:
        yield
    # Everything: a full disk, a folder where a file should be, a library's own trouble.
    except Exception as error:
        logger.warning("%s failed, the run goes on: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
