"""The daemon's log on stderr, for people or for machines."""

import logging
import sys
from typing import Any

import structlog


def configure(form: str, level: str) -> None:
    """Have events, and what libraries log, written to stderr, as text or as one JSON object a line."""
    number = logging.getLevelNamesMapping()[level.upper()]
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    processors: list[Any] = [structlog.processors.add_log_level, stamp]
    if form == "json":
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=number, handlers=[_ToStructlog()], force=True)


class _ToStructlog(logging.Handler):
    """Hands what is logged the standard way to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        facts: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            facts["exc_info"] = record.exc_info
        log.log(record.levelno, record.getMessage(), **facts)
