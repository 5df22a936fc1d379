"""Work that a run can do without: its failure is one line in the log and changes neither training nor exit status."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Around work without collectives."""
    try:
        yield
    # Everything: a full disk, a folder where a file should be, a library's own trouble.
    except Exception as error:
        logger.warning("%s failed, the run goes on: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
