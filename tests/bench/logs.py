"""What is measured in this process logs as the services do."""

import logging
import sys

import structlog


def show_errors_only() -> None:
    """On stderr, so that no line of theirs stands between ours; `penstock up` keeps its services' in the data folder."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR), logger_factory=structlog.WriteLoggerFactory(file=sys.stderr)
    )
