"""One line of JSON for each request: who, which dial, how many tokens; text only where the operator asks for it."""

import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from ctrlrl.errors import RunError
from ctrlrl.serving.policies import Audit


class AuditLog:
    """Appends lines to the file that the policies name, or to standard output. RunError if it cannot be opened."""

    def __init__(self, audit: Audit):
        self.text = audit.text
        self._file: TextIO = sys.stdout
        if audit.file:
            try:
                self._file = open(audit.file, "a", encoding="utf-8")
            except OSError as error:
                raise RunError(f"audit.file {audit.file!r} cannot be written: {error.strerror}") from None

    def write(self, **line: Any) -> None:
        """One line. A disk that is full is told on standard error; answers go on."""
        try:
            print(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}), file=self._file, flush=True)
        except OSError as error:
            print(f"ctrlrl: the audit line of a request is lost: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not sys.stdout:
            self._file.close()
