"""What medseg warned of, apart from what Python and other libraries warn of meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from medseg.errors import DataWarning


def notices(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """The sentences of medseg's own warnings.

    Files and sockets that an earlier test left open are warned of whenever memory is tidied, so a
    test that counts warnings counts these alone.
    """
    return [str(one.message) for one in caught if issubclass(one.category, DataWarning)]
